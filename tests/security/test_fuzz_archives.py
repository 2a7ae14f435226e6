"""Archives and the formats inside of them, damaged or made to harm."""

from collections import Counter
import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from moe.data import archives
from moe.data.archives import open_archive
from moe.data.sources import (
    asterisk,
    bbc,
    czech_speech,
    definitions,
    dictionary,
    fashion_mnist,
    fortunes,
    interface,
    mnist_digits,
    movie_reviews,
    novels,
    sword,
)
from moe.errors import DataError
from tests.data.sources import tiny_packages
from tests.data.sources.test_speech import ogg, wav
from tests.data.tiny_archives import deb, tar, tgz, wheel
from tests.security.fuzz import check, mutated_of, sizes

MEMBERS = {"a/one.txt": b"1" * 300, "a/b/two.bin": bytes(range(256))}
LINKS = [("a/again", tarfile.LNKTYPE, "a/one.txt"), ("a/sign", tarfile.SYMTYPE, "one.txt")]
ARCHIVES = {
    ".deb": (deb(tar(MEMBERS)), deb(tar(MEMBERS), ""), deb(tar(MEMBERS), "gz")),
    ".tgz": (tgz(tar(MEMBERS, LINKS)),),
    ".zip": (wheel(MEMBERS),),
}


@sizes(60)
@pytest.mark.parametrize("suffix", ARCHIVES)
def test_archives(tmp_path, examples, suffix):
    path = tmp_path / f"x{suffix}"

    def holds(data):
        path.write_bytes(data)
        for read in open_archive(path).values():
            read()

    check(examples, holds, mutated_of(*ARCHIVES[suffix]))
    assert [*tmp_path.iterdir()] == [path]


@sizes(150)
def test_tars(tmp_path, examples):
    """Below the compression, whose checksum hides most of what can be wrong with a tar."""

    def holds(data):
        archives._tar_members(tmp_path / "x.tar", data)

    check(examples, lambda data: _as_archive(holds, data), mutated_of(tar(MEMBERS, LINKS)))


def _as_archive(holds, data):
    try:
        holds(data)
    except archives._DAMAGE as error:  # as `open_archive` does
        raise DataError(str(error) or repr(error)) from error


# ---- what is inside

PIXELS = np.arange(28 * 28, dtype=np.float64).reshape(-1) / (28 * 28)
IDX = struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 3) + bytes(18)
LABELS = struct.pack(">4BI", 0, 0, 8, 1, 2) + bytes(2)
BOOKS = {"Gen": [["one", "two"], ["three"]], "Matt": [["four"], ["five"]]}
WORDNET = b'  1 licence\n00001740 03 n 01 entity 0 000 | that which is; "an example"\n'
PAGE = (
    b'<page xmlns="http://projectmallard.org/1.0/" id="x"><info><desc>About</desc></info>'
    b"<title>T</title><p>Text <em>and</em> more</p></page>"
)
NOVEL = tiny_packages.r_database(
    tiny_packages.r_strings(["EMMA", "", "CHAPTER 1", "It was.", "CHAPTER 2", "It is."])
)
HELP = "usr/share/help/"


def sword_part(kind):
    files = tiny_packages.sword_files(BOOKS)
    name = next(name for name in files if name.endswith(kind))
    return files[name], lambda data: [
        *sword.read_chapters(tiny_packages.members(files | {name: data}), "x")
    ]


def with_file(name, read):
    """Reads a package of one file."""
    return lambda data: read(tiny_packages.members({name: data}))


def wordnet(read):
    names = [f"usr/share/wordnet/data.{part}" for part in ("noun", "verb", "adj", "adv")]
    return lambda data: [*read(tiny_packages.members(dict.fromkeys(names, data)))]


def fashion(data):
    members = {
        f"{fashion_mnist._FOLDER}/train-images-idx3-ubyte.gz": gzip.compress(data),
        f"{fashion_mnist._FOLDER}/train-labels-idx1-ubyte.gz": gzip.compress(LABELS),
    }
    fashion_mnist.read_part(tiny_packages.members(members), "train")


def manual(data):
    pages = {f"{HELP}C/a/x.page": PAGE, f"{HELP}de/a/x.page": data}
    return [*interface.read_manuals(tiny_packages.members(pages), "de", Counter())]


def fashion_gzip(data):
    return fashion_mnist._read_idx({"x": lambda: data}, "x", dimensions=3)


DIGITS = {f"package/src/digits/{d}.json": json.dumps({"data": []}).encode() for d in range(10)}
SCRIPT = (
    b'dialogId("a-1", "font_big", "Hello.")\ndialogStr("Ahoj.")\n'
    b'dialogId("b", "font_small", "Yes \\"x\\".")\ndialogStr("Ano.")\n'
)
READERS = {
    "wav": (wav(np.arange(400, dtype=np.int16)), lambda data: asterisk.read_wav(data, "x")),
    "ogg": (
        ogg(np.sin(np.arange(2000) / 9), 22050),
        lambda data: czech_speech.read_ogg(data, "x"),
    ),
    "idx": (IDX, fashion),
    "gzip": (
        gzip.compress(IDX),
        fashion_gzip,
    ),
    "mnist": (
        json.dumps({"data": PIXELS.tolist()}).encode(),
        lambda data: [
            *mnist_digits.read_digits(
                tiny_packages.members(DIGITS | {"package/src/digits/0.json": data})
            )
        ],
    ),
    "sword index": sword_part("ot.bzs"),
    "sword verses": sword_part("ot.bzv"),
    "sword blocks": sword_part("ot.bzz"),
    "dictionary": (WORDNET, wordnet(dictionary.read_glosses)),
    "definitions": (WORDNET, wordnet(definitions.read_definitions)),
    "catalogue": (
        tiny_packages.catalogue({"": "header", "Open": "Auf", "~Close": "Zu"}),
        lambda data: [*interface.read_catalogue(data, "x.mo")],
    ),
    "manual": (PAGE, manual),
    "novels": (NOVEL, with_file(novels._DATABASE, lambda m: [*novels.read_chapters(m)])),
    "strings": (
        tiny_packages.r_strings(["EMMA", "CHAPTER 1"]),
        lambda data: novels.strings(data, "x"),
    ),
    "reviews": (
        b'text,label,source\n"good <br /> film",1,imdb\nbad,0,imdb\n',
        with_file(movie_reviews._FILE, lambda m: [*movie_reviews.read_reviews(m, "imdb")]),
    ),
    "bbc": (b"Title\n\nText.", with_file(f"{bbc._FOLDER}/tech/1.txt", bbc.read_articles)),
    "fortunes": (
        b"one\n%\ntwo\n  -- who\n%\n",
        with_file(
            "usr/share/games/fortunes/x",
            lambda m: [*fortunes.read_fortunes(m, "fortunes-zh", "x", Counter())],
        ),
    ),
    "script": (
        SCRIPT,
        with_file("usr/share/games/fillets-ng/script/a/dialogs_cs.lua", czech_speech.read_scripts),
    ),
}


@sizes(60)
@pytest.mark.parametrize("kind", READERS)
def test_formats_of_packages(examples, kind):
    original, read = READERS[kind]
    read(original)
    check(examples, read, mutated_of(original))


# ---- made to harm


@pytest.mark.parametrize("name", ["a\\..\\..\\x", "..\\x", "C:\\x"])
@pytest.mark.parametrize("kind", [".tgz", ".zip", ".deb"])
def test_names_of_other_systems(tmp_path, name, kind):
    files = {**MEMBERS, name: b"!"}
    path = tmp_path / f"x{kind}"
    if kind == ".zip":
        path.write_bytes(wheel(files))
    else:
        path.write_bytes(deb(tar(files)) if kind == ".deb" else tgz(tar(files)))
    with pytest.raises(DataError, match="outside the archive's own folder"):
        open_archive(path)


def test_a_member_without_a_name_is_damage(tmp_path):
    data = bytearray(wheel({"x": b"1"}))
    listed = data.rindex(b"PK\x01\x02")
    struct.pack_into("<HHH", data, listed + 28, 0, 0, 1)  # its name becomes a comment
    path = tmp_path / "x.whl"
    path.write_bytes(data)
    with pytest.raises(DataError, match="a member has no name"):
        open_archive(path)


def test_a_name_ends_at_nul_or_is_refused(tmp_path):
    """The header of a tar and the list of a zip end a name there; an extended header does not."""
    (tmp_path / "x.zip").write_bytes(wheel({"a?b": b"!"}).replace(b"a?b", b"a\0b"))
    assert [*open_archive(tmp_path / "x.zip")] == ["a"]
    (tmp_path / "x.tgz").write_bytes(tgz(tar({"a?b": b"!"}).replace(b"a?b", b"a\0b")))
    with pytest.raises(DataError, match="damaged"):  # its checksum
        open_archive(tmp_path / "x.tgz")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("x")
        info.pax_headers = {"path": "a\0b"}
        archive.addfile(info)
    (tmp_path / "y.tgz").write_bytes(tgz(file.getvalue()))
    with pytest.raises(DataError, match="outside the archive's own folder"):
        open_archive(tmp_path / "y.tgz")


@pytest.mark.parametrize("kind", [".tgz", ".zip"])
def test_two_members_of_one_name(tmp_path, kind):
    file = io.BytesIO()
    if kind == ".zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/x", "one")
            archive.writestr("./a/x", "two")
        data = file.getvalue()
    else:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, text in (("a/x", b"one"), ("./a/x", b"two")):
                info = tarfile.TarInfo(name)
                info.size = 3
                archive.addfile(info, io.BytesIO(text))
        data = tgz(file.getvalue())
    (tmp_path / f"x{kind}").write_bytes(data)
    with pytest.raises(DataError, match="twice"):
        open_archive(tmp_path / f"x{kind}")


BOMB = bytes(archives._ALWAYS + 2**20)  # a thousandth of it packed: more than the bound allows


@pytest.mark.parametrize("kind", [".tgz", ".deb", "gz.deb", ".zip"])
def test_a_bomb_ends_before_memory_does(tmp_path, kind):
    """A thousand times its size is not unpacked, whatever its header says."""
    makers = {".tgz": lambda m: tgz(tar(m)), ".deb": lambda m: deb(tar(m)), ".zip": wheel}
    makers["gz.deb"] = lambda m: deb(tar(m), "gz")
    path = tmp_path / f"x{kind}"
    path.write_bytes(makers[kind]({"a": BOMB}))
    assert path.stat().st_size * 500 < len(BOMB)
    with pytest.raises(DataError, match=rf"x{kind} unpacks to more than \d+ bytes.*Delete") as told:
        open_archive(path)
    assert len(str(told.value)) < 400


def test_all_members_together_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_ALWAYS", 1000)
    (tmp_path / "x.zip").write_bytes(wheel({f"{n}": bytes(15_000) for n in range(4)}))
    assert (tmp_path / "x.zip").stat().st_size < 600
    with pytest.raises(DataError, match="unpacks to more than"):
        open_archive(tmp_path / "x.zip")


def sword_bomb():
    """Many blocks that are the same bytes, each of them small."""
    files = tiny_packages.sword_files(BOOKS)
    name = next(name for name in files if name.endswith("ot.bzz"))
    packed = zlib.compress(BOMB[: 2**20])
    index = struct.pack("<III", 0, len(packed), 2**20) * 33
    files |= {name: packed, name.replace(".bzz", ".bzs"): index}
    return [*sword.read_chapters(tiny_packages.members(files), "x")]


DEEP_PAGE = (
    b'<page xmlns="http://projectmallard.org/1.0/">' + b"<a>" * 5000 + b"</a>" * 5000 + b"</page>"
)
GROWING = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
INSIDE = {
    "idx": (lambda: fashion_gzip(gzip.compress(BOMB)), "unpacks to more than"),
    "novels": (
        lambda: [*novels.records(len(BOMB).to_bytes(4, "big") + zlib.compress(BOMB))],
        "unpacks to more than",
    ),
    "sword": (sword_bomb, "unpacks to more than"),
    "entities": (
        lambda: manual(
            f'<!DOCTYPE page [<!ENTITY e0 "{"x" * 50}">{GROWING}]><page>&e9;</page>'.encode()
        ),
        "amplification",
    ),
    "nesting": (lambda: manual(DEEP_PAGE), "nested deeper"),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_a_bomb_inside_a_member(kind):
    read, message = INSIDE[kind]
    with pytest.raises(DataError, match=message):
        read()


def test_what_is_large_and_no_bomb_is_read():
    noise = np.random.default_rng(0).bytes(2**20)
    data, rest = archives.inflate(zlib.compress(noise) + b"more", "x", 2**20)
    assert (data, rest) == (noise, b"more")
    with pytest.raises(DataError, match="x unpacks to more than 1048575 bytes"):
        archives.inflate(zlib.compress(noise), "x", 2**20 - 1)


@pytest.mark.parametrize("wbits", [zlib.MAX_WBITS, 31])
def test_a_stream_that_is_cut_anywhere_is_not_what_it_was(wbits):
    stream = zlib.compress(b"some text " * 9, wbits=wbits)
    assert archives.inflate(stream, "x", 2**20, wbits=wbits) == (b"some text " * 9, b"")
    for end in range(len(stream)):
        with pytest.raises(DataError, match="x is truncated or damaged: it ends in the middle"):
            archives.inflate(stream[:end], "x", 2**20, wbits=wbits)


def test_a_zip_whose_list_says_less_than_its_members_hold(tmp_path):
    data = bytearray(wheel({"a": bytes(2_000_000)}))
    for magic, field in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        at = data.index(magic) + field
        assert int.from_bytes(data[at : at + 4], "little") == 2_000_000
        data[at : at + 4] = (10).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(DataError, match="truncated or damaged"):
        open_archive(tmp_path / "x.zip")["a"]()
