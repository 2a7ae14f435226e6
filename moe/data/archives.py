"""Package archives read in memory: nothing is unpacked, so nothing is ever written by a name in them.

A name that leaves its folder still is refused: an archive with one is not the one that was recorded.
"""

from collections.abc import Callable, Mapping
import gzip
import io
import lzma
from pathlib import Path, PurePosixPath
import posixpath
import subprocess
import tarfile
import zipfile
import zlib

from moe.errors import DataError

LARGEST = 4 * 2**30  # bytes of an archive's members together; data sets of packages are far below
RATIO = 100  # of text and tables it is 3 to 20; what zlib makes of zeros is 1000, xz 7000
_ALWAYS = 32 * 2**20  # bytes that anything may unpack to

Reader = Callable[[], bytes]

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60  # bytes: name 16, date 12, owner 6, group 6, mode 8, size 10, magic 2
_ZIP_END = b"PK\5\6"  # the last record; at byte 10 it has the number of members in two bytes
_ZIP64 = 0xFFFF  # the number stands elsewhere
_CHUNK = 2**20
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)
_BAD_ZIP = (*_DAMAGE, RuntimeError, NotImplementedError, ValueError)  # encrypted, unknown method


def open_archive(path: Path) -> dict[str, Reader]:
    """The members of an archive: relative name -> function that returns the member's bytes.

    The whole archive is held in memory: random access into a compressed tar decompresses it anew.
    Directories and symbolic links are no members; what a link names is one itself.

    Args:
        path: `.deb`, `.whl`, `.zip`, `.tgz` or `.tar.gz`.

    Raises:
        DataError: another kind of file, one that cannot be read, is damaged, names a path outside
            its own folder, or unpacks to more than `largest` bytes.
    """
    kinds = {".deb": _open_deb, ".whl": _open_zip, ".zip": _open_zip, ".tgz": _open_tgz}
    kinds[".tar.gz"] = _open_tgz
    suffix = next((suffix for suffix in kinds if path.name.endswith(suffix)), None)
    if suffix is None:
        raise DataError(f"{path} is no archive that is read here: {', '.join(kinds)} are.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    try:
        return kinds[suffix](path, data)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: object) -> DataError:
    return DataError(
        f"{path} is truncated or damaged: {error}. Delete it, and it will be fetched again."
    )


def _open_deb(path: Path, data: bytes) -> dict[str, Reader]:
    if not data.startswith(_AR_MAGIC):
        raise _damaged(path, "it is no Debian package")
    start = len(_AR_MAGIC)
    while start < len(data):
        name, content = _ar_member(path, data, start)
        if name.startswith("data.tar"):
            return _tar_members(path, _unpack_deb(path, name, content), rooted=True)
        start += _AR_HEADER + len(content) + len(content) % 2
    raise _damaged(path, "it has no member data.tar")


def _ar_member(path: Path, data: bytes, start: int) -> tuple[str, bytes]:
    header = data[start : start + _AR_HEADER]
    size = header[48:58].strip()
    if len(header) < _AR_HEADER or header[58:] != b"`\n" or not size.isdigit():
        raise _damaged(path, f"there is no member header at byte {start}")
    content = data[start + _AR_HEADER : start + _AR_HEADER + int(size)]
    if len(content) < int(size):
        raise _damaged(path, f"{len(content)} of {int(size)} bytes are left at byte {start}")
    return header[:16].decode("latin-1").strip().rstrip("/"), content


def _unpack_deb(path: Path, name: str, content: bytes) -> bytes:
    if name == "data.tar.xz":
        return _read_all(path, lzma.open(io.BytesIO(content)), len(content))
    if name == "data.tar.gz":
        return _read_all(path, gzip.open(io.BytesIO(content)), len(content))
    if name == "data.tar":
        return content
    if name != "data.tar.zst":
        raise DataError(f"{path} holds {name}, whose compression is not read here.")
    return _unpack_zstandard(path)


def _unpack_zstandard(path: Path) -> bytes:
    """Ubuntu's packages; this Python has no Zstandard, but every system with apt has dpkg-deb."""
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            data = _read_all(path, process.stdout, path.stat().st_size)
            said = process.stderr.read().decode("utf-8", "replace").strip()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is compressed with Zstandard, which takes `dpkg-deb` to read; install dpkg."
        ) from error
    if process.returncode != 0:
        raise _damaged(path, said)
    return data


def _open_tgz(path: Path, data: bytes) -> dict[str, Reader]:
    return _tar_members(path, _read_all(path, gzip.open(io.BytesIO(data)), len(data)))


def largest(packed: int) -> int:
    """To how many bytes so many may unpack: what grows further is made to fill the memory."""
    return min(LARGEST, max(_ALWAYS, RATIO * packed))


def inflate(
    data: bytes, where: str, most: int, *, wbits: int = zlib.MAX_WBITS
) -> tuple[bytes, bytes]:
    """Decompresses the zlib stream that a member of an archive starts with.

    Args:
        data: the stream, and what comes after it.
        where: file and part, to name in errors.
        most: bytes that it may unpack to, of `largest`.
        wbits: of `zlib`; 31 is gzip.

    Returns:
        What it unpacks to, and what came after it.

    Raises:
        DataError: it is truncated or damaged, or unpacks to more.
    """
    stream = zlib.decompressobj(wbits)
    try:
        unpacked = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise DataError(f"{where} is truncated or damaged: {error}.") from error
    if len(unpacked) > most:
        raise _too_large(where, most)
    if not stream.eof:
        raise DataError(f"{where} is truncated or damaged: it ends in the middle.")
    return unpacked, stream.unused_data


def _read_all(path: Path, file, packed: int) -> bytes:
    """Decompresses to the end, which checks the checksums, but never beyond `largest(packed)`."""
    parts, size, most = [], 0, largest(packed)
    with file:
        while part := file.read(_CHUNK):
            parts.append(part)
            size += len(part)
            if size > most:
                raise _too_large(path, most)
    return b"".join(parts)


def _too_large(where: Path | str, most: int) -> DataError:
    return DataError(
        f"{where} unpacks to more than {most} bytes ({RATIO} times its size, at most {LARGEST}), which no "
        "data set here does: it was made to fill the memory. Delete the archive, and fetch it again "
        "from a registry that you trust."
    )


def _tar_members(path: Path, data: bytes, *, rooted: bool = False) -> dict[str, Reader]:
    """Reads a tar; `rooted`: absolute links count from its own root, as in Debian packages."""
    spans: dict[str, tuple[int, int]] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            name = _name(path, member.name)
            if member.issym():
                _check_link(path, name, member.linkname, rooted)
            elif not member.isdir():
                _check_new(path, name, spans)
                spans[name] = _span(path, member, spans)
        if any(data[tar.offset : tar.offset + tarfile.BLOCKSIZE]):  # tarfile ends there in silence
            raise _damaged(path, f"there is no member header at byte {tar.offset}")
    return {
        name: lambda start=start, end=end: data[start:end] for name, (start, end) in spans.items()
    }


def _span(
    path: Path, member: tarfile.TarInfo, spans: Mapping[str, tuple[int, int]]
) -> tuple[int, int]:
    """First and last byte of a file, or of the earlier file that a hard link names."""
    if member.islnk():
        target = _name(path, member.linkname)
        if target not in spans:
            raise _damaged(path, f"{member.name} links to {target}, which is not before it")
        return spans[target]
    if not member.isreg() or member.issparse():
        raise DataError(f"{path}: member {member.name!r} is neither file nor folder nor link.")
    return member.offset_data, member.offset_data + member.size


def _open_zip(path: Path, data: bytes) -> dict[str, Reader]:
    members: dict[str, Reader] = {}
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except _BAD_ZIP as error:
        raise _damaged(path, error) from error
    end = data.rfind(_ZIP_END)
    stated = int.from_bytes(data[end + 10 : end + 12], "little")
    if stated not in (len(archive.infolist()), _ZIP64):  # zipfile passes over what is missing
        raise _damaged(path, f"it lists {len(archive.infolist())} of {stated} members")
    if sum(info.file_size for info in archive.infolist()) > largest(len(data)):
        raise _too_large(path, largest(len(data)))
    for info in archive.infolist():
        if not info.filename:  # of which zipfile could not tell whether it is a folder
            raise _damaged(path, "a member has no name")
        name = _name(path, info.filename)
        if not info.is_dir():
            _check_new(path, name, members)
            members[name] = lambda info=info: _read_zipped(path, archive, info)
    return members


def _read_zipped(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(info)
    except _BAD_ZIP as error:
        raise _damaged(path, f"{info.filename}: {error}") from error


def _name(path: Path, name: str) -> str:
    parts = PurePosixPath(name)
    # A backslash parts folders on other systems, where such a name would leave them.
    if parts.is_absolute() or ".." in parts.parts or "\0" in name or "\\" in name:
        raise DataError(
            f"{path}: member {name!r} is a path outside the archive's own folder; such an archive "
            "is not read."
        )
    return str(parts)


def _check_new(path: Path, name: str, members: Mapping[str, object]) -> None:
    if name in members:
        raise DataError(
            f"{path}: member {name!r} stands twice, and readers would disagree on which counts; such an "
            "archive is not read."
        )


def _check_link(path: Path, name: str, target: str, rooted: bool) -> None:
    if rooted and target.startswith("/"):
        return
    reached = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    if reached.startswith(("/", "..")):
        raise DataError(
            f"{path}: the link {name!r} to {target!r} leaves the archive's own folder; such an "
            "archive is not read."
        )


def require(members: Mapping[str, Reader], name: str, package: str) -> bytes:
    """The bytes of one member.

    Raises:
        DataError: the archive has no such member.
    """
    if name not in members:
        raise DataError(
            f"The package {package} has no file {name!r}: it is another version than its reader "
            "was written against."
        )
    return members[name]()
