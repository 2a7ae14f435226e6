import contextlib
import io
import os
import re
from unittest import mock

import pytest

from moe import cli
from moe.data.sources import catalogue
from moe.data.sources.builder import make_builder, prepare
from moe.data.sources.catalogue import CATALOGUE, Entry
from moe.data.sources.prepared import find_prepared, read_text
from moe.errors import ConfigError, DataError
from scripts import prepare_data
from tests.data.tiny_archives import write
from tests.data.tiny_package import FILES

WORDS = {
    f"package/{split}.txt": " ".join(f"{'ab'[i % 2]}{split}{i}" for i in range(n)).encode()
    for split, n in {"train": 9, "valid": 3, "test": 4}.items()
}


@pytest.fixture(autouse=True)
def entries(monkeypatch):
    for name, config in {"tiny": "one", "tiny_two": "two"}.items():
        row = Entry("tests.data.tiny_package", "TinyWords", "language", f"{config} words", config)
        monkeypatch.setitem(CATALOGUE, name, row)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data directory that has the archives, and no client that could fetch others."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for name in FILES.values():
        write(tmp_path / "packages" / name, WORDS)
    return tmp_path


def run(*arguments):
    """The script as a shell would run it: exit code, stdout, stderr."""
    prepare_data.FLAGS.unparse_flags()
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch("sys.argv", ["prepare_data.py", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        cli.run(prepare_data.main)
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def test_prepared_once_and_read_by_name(root, capfd):
    builder = prepare("tiny", root)
    assert {s: p.num_examples for s, p in builder.info.splits.items()} == {
        "train": 9,
        "valid": 3,
        "test": 4,
    }
    assert builder.info.file_format.value == "array_record"
    assert capfd.readouterr().out == ""
    path = find_prepared("tiny", root)
    assert path == root / "tiny_words" / "one" / "1.0.0"
    texts = sorted(document.text for document in read_text("tiny", path, "text").documents("train"))
    assert texts == sorted(WORDS["package/train.txt"].decode().split())
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    (root / "packages" / FILES["tiny-words"]).unlink()  # needed no more
    prepare("tiny", root)
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_configs_have_packages_of_their_own(root):
    assert [package.name for package in CATALOGUE["tiny"].packages()] == ["tiny-words"]
    builder = prepare("tiny_two", root)
    assert builder.info.splits["train"].num_examples == 18
    assert find_prepared("tiny_two", root) == root / "tiny_words" / "two" / "1.0.0"
    with pytest.raises(DataError, match="'tiny' is not prepared"):
        find_prepared("tiny", root)


def test_not_prepared(root):
    with pytest.raises(
        DataError, match=r"training never downloads.*python3 scripts/prepare_data\.py tiny\b"
    ):
        find_prepared("tiny", root)
    assert sorted(file.name for file in root.iterdir()) == ["packages"]


def test_a_folder_of_that_name_elsewhere_is_not_it(root, tmp_path_factory, monkeypatch):
    prepare("tiny", root)
    monkeypatch.chdir(root)
    with pytest.raises(DataError, match="'tiny' is not prepared"):
        find_prepared("tiny", tmp_path_factory.mktemp("other"))


def test_an_unknown_name(root):
    for ask in (find_prepared, prepare, make_builder):
        with pytest.raises(ConfigError, match=r"'fashion-mnist' .*did you mean 'fashion_mnist'"):
            ask("fashion-mnist", root)


def test_a_builder_without_archives(root):
    with pytest.raises(
        DataError, match=r"no archive of the package 'tiny-words'.*prepare_data\.py"
    ):
        make_builder("tiny", root).download_and_prepare(download_dir=root / "none")


def test_a_damaged_archive_leaves_nothing_prepared(root):
    archive = root / "packages" / FILES["tiny-words"]
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"tiny-words-1\.0\.0\.tgz is truncated or damaged"):
        prepare("tiny", root)
    with pytest.raises(DataError, match="is not prepared"):
        find_prepared("tiny", root)


def test_a_directory_that_cannot_be_written(root):
    (root / "tiny_words").write_text("in the way")
    with pytest.raises(DataError, match=r"Cannot write the prepared data set to .*--data_dir"):
        prepare("tiny", root)


def test_every_row_of_the_catalogue():
    directories = [str(entry.directory) for entry in CATALOGUE.values()]
    assert len(set(directories)) == len(directories)
    for name, entry in CATALOGUE.items():
        builder = entry.load()
        assert issubclass(builder, catalogue.tfds.core.GeneratorBasedBuilder), name
        assert str(entry.directory).split(os.sep)[0] == builder.name
        configs = [config.name for config in builder.BUILDER_CONFIGS or ()]
        assert entry.config in configs if configs else entry.config is None, name
        for package in entry.packages():
            assert package.client == "apt" or package.version, package
            assert package.sha256 or package.size or name.startswith("tiny"), package


def test_script_prints_what_it_prepared(root):
    code, out, err = run("tiny", "tiny_two", "tiny", f"--data_dir={root}")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("tiny: prepared in ")
    assert lines[0].endswith(str(root / "tiny_words" / "one" / "1.0.0"))
    assert lines[1] == "  examples: train 9, valid 3, test 4"
    assert lines[2] == "  features: text (text), label (2 classes)"
    assert re.fullmatch(r"  on disk: \d\.\d MB", lines[3])
    assert [line.split(":")[0] for line in lines[4:6]] == ["  train[0]", "  train[1]"]
    assert "text='atrain" in out
    assert lines[6].startswith("tiny_two: prepared in ")
    assert len(lines) == 12  # a name that is given twice is prepared once
    _, again, _ = run("tiny", f"--data_dir={root}")
    assert again.splitlines()[0].startswith("tiny: already prepared, ")
    assert again.splitlines()[1:] == lines[1:6]


def test_script_lists():
    code, out, _ = run("--list")
    assert code == 0
    listed = {line.split()[0]: line for line in out.splitlines()}
    assert list(listed) == list(CATALOGUE)
    assert listed["tiny"].endswith("one words")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "ConfigError: Name a data set, or several: "),
        (["tiny", "tinny"], 2, "did you mean 'tiny'"),
        (["tiny", "--nothing=1"], 2, "Unknown command line flag 'nothing'"),
        (["tiny"], 3, "npm comes with Node.js; install it"),
    ],
)
def test_script_refuses(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    ended, _, err = run(*arguments)
    assert ended == code
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "data" / "tiny_words" / "one" / "1.0.0").exists()


def test_script_tells_of_damaged_records(root):
    prepare("tiny", root)
    path = root / "tiny_words" / "one" / "1.0.0"
    records = next(path.glob("*train*array_record*"))
    records.write_bytes(records.read_bytes()[:100])
    code, _, err = run("tiny", f"--data_dir={root}")
    assert code == 3
    assert "Delete that directory and prepare the data set again" in err
