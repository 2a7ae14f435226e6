from pathlib import Path

from ml_collections import ConfigDict
import pytest

from moe.data.sources import open_source
from moe.data.sources.mix import mix_source, part_names
from moe.data.sources.types import SPLITS, Document, Request, Source
from moe.data.text import text_data
from moe.errors import ConfigError, DataError
from tests.data.sources.tiny_packages import build, r_database, r_strings

NOVELS = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def source(name: str, **domains: str) -> Source:
    """Two documents of each split and domain, `domain=text`."""

    def documents(split):
        for domain, text in domains.items():
            for number in range(2):
                yield Document(f"{text} {split} {number}", domain, f"{split}{number}")

    return Source(name, f"identity of {name}", documents)


SOURCES = {
    "novels": source("novels", prose="Emma"),
    "stdlib": source("stdlib", code="import", docs="Return"),
    "other": source("other", docs="Manual"),
}


def mixed(dataset: str) -> Source:
    request = Request(dataset, Path("nowhere"), None, "text")
    return mix_source(request, lambda name, request: SOURCES[name])


def test_documents_of_all():
    mix = mixed("novels, stdlib")
    for split in SPLITS:
        documents = [*mix.documents(split)]
        assert [d.domain for d in documents] == ["prose"] * 2 + ["code"] * 2 + ["docs"] * 2
        assert [d.text for d in documents[:2]] == [f"Emma {split} 0", f"Emma {split} 1"]
        assert documents == [*mix.documents(split)]  # the same at every call


def test_keys_of_different_sources_differ():
    documents = [*mixed("novels,stdlib").documents("train")]
    assert [d.key for d in documents[1:3]] == ["novels/train1", "stdlib/train0"]
    empty = Source("x", "", lambda split: iter([Document("a", "d")]))
    mix = mix_source(
        Request("x,y", Path(), None, ""), lambda name, r: {"x": empty}.get(name, SOURCES["novels"])
    )
    assert next(mix.documents("train")).key == ""


def test_identity_follows_the_parts():
    identities = [mixed(d).identity for d in ("novels,stdlib", "stdlib,novels", "novels,stdlib@9")]
    assert len({*identities, mixed("novels,other").identity}) == 4
    assert identities[0] == mixed("novels, stdlib").identity


def test_limit_is_of_a_domain_in_a_split():
    documents = [*mixed("novels,stdlib@16").documents("train")]  # `import train 0` has 14 bytes
    assert [d.text for d in documents[2:]] == ["import train 0", "Return train 0"]
    documents = [*mixed("novels,stdlib@28").documents("train")]
    assert len(documents) == 6
    assert len([*mixed("novels,stdlib@1").documents("train")]) == 4  # one at least


def test_domain_that_two_sources_have():
    mix = mixed("stdlib,other")
    with pytest.raises(ConfigError, match="stdlib and other both have the domain 'docs'"):
        [*mix.documents("valid")]


def test_domain_that_two_sources_have_in_different_splits():
    halves = {
        "a": Source("a", "", lambda s: iter([Document("x", "d")] if s == "train" else [])),
        "b": Source("b", "", lambda s: iter([Document("x", "d")] if s == "test" else [])),
    }
    mix = mix_source(Request("a,b", Path(), None, ""), lambda name, request: halves[name])
    assert len([*mix.documents("train")]) == 1
    with pytest.raises(ConfigError, match="a and b both have the domain 'd'"):
        [*mix.documents("test")]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("novels", "two sources or more"),
        ("novels,", "two sources or more"),
        ("novels,stdlib,novels@5", "'novels' cannot stand in it"),
        ("novels,mix:a", "'mix:a' cannot stand in it"),
        ("novels,stdlib@", "must end with a number of bytes"),
        ("novels,stdlib@0", "must end with a number of bytes"),
        ("novels,stdlib@4MB", "must end with a number of bytes"),
    ],
)
def test_bad_names(dataset, message):
    with pytest.raises(ConfigError, match=message):
        part_names(dataset)


def test_limits_are_parsed():
    assert part_names("a, tfds:lm1b:1.0.0@30") == [("a", None), ("tfds:lm1b:1.0.0", 30)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    novels = [
        r_strings([title, "Chapter 1", f"It is in {title}. " * 30, "Chapter 2", "So. " * 90])
        for title in ("EMMA", "Persuasion", "NORTHANGER ABBEY")
    ]
    build("novels", {"r-cran-janeaustenr": {NOVELS: r_database(*novels)}}, folder)
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"Text {number}. " * 40)
    return folder / "data"


def request(directory: Path, dataset: str = "", files=None) -> Request:
    return Request(dataset, directory, files, "text")


def test_name_of_the_catalogue_opens_its_directory(directory):
    novels = open_source("novels", request(directory))
    assert [d.key.split("/")[0] for d in novels.documents("test")] == ["persuasion"] * 2
    assert {d.domain for d in novels.documents("train")} == {"novels"}


def test_mix_becomes_batches(directory):
    data = text_data(
        name="mix:novels,files",
        root=directory,
        batch_size=2,
        sequence_length=32,
        seed=0,
        files={"mine": str(directory.parent / "*.txt")},
        weights=ConfigDict({"novels": 3.0, "mine": 1.0}).to_dict(),
    )
    assert set(data.domains) == {"novels", "mine"}
    assert data.weights == {"novels": 0.75, "mine": 0.25}
    assert all(data.counts[split][name].documents for split in SPLITS for name in data.domains)


@pytest.mark.parametrize("name", ["novels", "german", "verses_en_es"])
def test_not_prepared(tmp_path, name):
    with pytest.raises(DataError, match=rf"python3 scripts/prepare_data\.py {name}"):
        open_source(name, request(tmp_path))


@pytest.mark.parametrize(
    ("name", "dataset", "files", "message"),
    [
        ("novel", "", None, "nearest is 'novels'"),
        ("mix", "", None, "mix needs the sources to join"),
        ("tfds", "", None, "tfds needs a data set"),
        ("novels", "emma", None, "only tfds and mix take a name"),
        ("novels", "", "*.txt", "does not read it"),
        ("mix", "novels,stdlib", "*.txt", "does not read it"),
        ("mix", "novels,stdlibs", None, "'stdlibs' is no text source"),
    ],
)
def test_bad_requests(directory, name, dataset, files, message):
    with pytest.raises(ConfigError, match=message):
        open_source(name, request(directory, dataset, files))
