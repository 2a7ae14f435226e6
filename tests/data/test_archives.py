import tarfile

import pytest

from moe.data import archives
from moe.data.archives import open_archive, require
from moe.errors import DataError
from tests.data.tiny_archives import deb, tar, tgz, wheel, write

MEMBERS = {"a/one.txt": b"1" * 3000, "a/b/two.bin": bytes(range(256)) * 9, "a/empty": b""}
PACKED = {
    "xz.deb": deb(tar(MEMBERS)),
    "gz.deb": deb(tar(MEMBERS), "gz"),
    "plain.deb": deb(tar(MEMBERS), ""),
    "x.tgz": tgz(tar(MEMBERS)),
    "x.tar.gz": tgz(tar(MEMBERS)),
    "x.whl": wheel(MEMBERS),
    "x.zip": wheel(MEMBERS),
}


def contents(path):
    return {name: read() for name, read in open_archive(path).items()}


def opened(folder, name, data):
    (folder / name).write_bytes(data)
    return contents(folder / name)


@pytest.mark.parametrize("name", PACKED)
def test_members(tmp_path, name):
    assert opened(tmp_path, name, PACKED[name]) == MEMBERS


def test_names_of_debian_packages_start_with_a_dot(tmp_path):
    dotted = {f"./{name}": data for name, data in MEMBERS.items()}
    assert opened(tmp_path, "x.deb", deb(tar(dotted))) == MEMBERS


def test_a_hard_link_is_a_member_and_a_symbolic_link_is_none(tmp_path):
    links = [
        ("a/again", tarfile.LNKTYPE, "a/one.txt"),
        ("a/b/sign", tarfile.SYMTYPE, "../one.txt"),
        ("a/root", tarfile.SYMTYPE, "/a/one.txt"),  # a package's root is that of the system
    ]
    found = opened(tmp_path, "x.deb", deb(tar(MEMBERS, links)))
    assert found == {**MEMBERS, "a/again": MEMBERS["a/one.txt"]}


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a/.."])
@pytest.mark.parametrize("kind", ["x.deb", "x.tgz", "x.whl"])
def test_a_name_outside_its_folder_is_refused(tmp_path, name, kind):
    with pytest.raises(DataError, match=r"outside the archive's own folder"):
        contents(write(tmp_path / kind, {**MEMBERS, name: b"!"}))


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        (tarfile.SYMTYPE, "../../etc/passwd", "leaves the archive's own folder"),
        (tarfile.SYMTYPE, "b/../../..", "leaves the archive's own folder"),
        (tarfile.SYMTYPE, "/etc/passwd", "leaves the archive's own folder"),
        (tarfile.LNKTYPE, "../etc/passwd", "outside the archive's own folder"),
        (tarfile.LNKTYPE, "/etc/passwd", "outside the archive's own folder"),
        (tarfile.LNKTYPE, "a/later", "is not before it"),
        (tarfile.CHRTYPE, "", "neither file nor folder nor link"),
        (tarfile.FIFOTYPE, "", "neither file nor folder nor link"),
    ],
)
def test_links_and_devices_are_refused(tmp_path, kind, target, message):
    with pytest.raises(DataError, match=message):
        opened(tmp_path, "x.tgz", tgz(tar(MEMBERS, [("a/link", kind, target)])))


@pytest.mark.parametrize("name", PACKED)
def test_truncated_anywhere(tmp_path, name):
    data = PACKED[name]
    last = len(data)
    if name == "plain.deb":  # its last bytes are those after the end of the tar
        last -= 2 * tarfile.BLOCKSIZE
    for end in [*range(0, last, 97), last - 1]:
        with pytest.raises(DataError, match=rf"{name} is truncated or damaged.*fetched again"):
            opened(tmp_path, name, data[:end])


@pytest.mark.parametrize("name", ["xz.deb", "gz.deb", "x.tgz", "x.whl"])
def test_no_flipped_bit_gives_other_contents(tmp_path, name):
    data = PACKED[name]
    found = []
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        try:
            found.append(opened(tmp_path, name, bytes(flipped)))
        except DataError:
            continue
    assert all(members == MEMBERS for members in found)
    assert len(found) < len(data) * 2 // 3  # in times and the like it does not matter


def test_a_damaged_header_within_a_tar_is_no_end(tmp_path):
    data = bytearray(tar(MEMBERS))
    data[data.index(b"a/b/two.bin")] ^= 1
    with pytest.raises(DataError, match="no member header at byte"):
        opened(tmp_path, "x.tgz", tgz(bytes(data)))


@pytest.mark.parametrize("name", ["xz.deb", "gz.deb", "x.tgz", "x.whl"])
def test_absurd_sizes(tmp_path, name, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST", 4000)
    with pytest.raises(DataError, match="unpacks to more than 4000 bytes"):
        opened(tmp_path, name, PACKED[name])


def client(folder, monkeypatch, text):
    """Puts a `dpkg-deb` on the path."""
    (folder / "dpkg-deb").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "dpkg-deb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_zstandard_is_read_by_dpkg(tmp_path, monkeypatch):
    (tmp_path / "tar").write_bytes(tar(MEMBERS))
    client(tmp_path, monkeypatch, f'[ "$1" = --fsys-tarfile ] && cat {tmp_path / "tar"}')
    assert opened(tmp_path, "x.deb", deb(b"", "zst")) == MEMBERS
    client(tmp_path, monkeypatch, "echo broken pipe >&2; exit 2")
    with pytest.raises(DataError, match=r"truncated or damaged: broken pipe"):
        opened(tmp_path, "x.deb", deb(b"", "zst"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"takes `dpkg-deb` to read; install dpkg"):
        opened(tmp_path, "x.deb", deb(b"", "zst"))


def test_other_files(tmp_path):
    with pytest.raises(DataError, match=r"x\.rar is no archive that is read here: \.deb, "):
        opened(tmp_path, "x.rar", b"")
    with pytest.raises(DataError, match=r"Cannot read .*none\.deb: No such file"):
        open_archive(tmp_path / "none.deb")
    with pytest.raises(DataError, match=r"has no member data\.tar"):
        opened(tmp_path, "x.deb", deb(b"", "gz").replace(b"data.tar.gz", b"date.tar.gz"))
    with pytest.raises(DataError, match=r"holds data\.tar\.br, whose compression is not read"):
        opened(tmp_path, "x.deb", deb(b"", "gz").replace(b"data.tar.gz", b"data.tar.br"))


def test_require(tmp_path):
    members = open_archive(write(tmp_path / "x.whl", MEMBERS))
    assert require(members, "a/empty", "some") == b""
    with pytest.raises(
        DataError, match=r"package some has no file 'a/none': it is another version"
    ):
        require(members, "a/none", "some")
