"""Archives of a few members, as the registries serve them, made in memory."""

import gzip
import io
import lzma
import pathlib
import tarfile
import zipfile


def tar(members: dict[str, bytes], links=()) -> bytes:
    """A tar of files, then of `links`: (name, type, target)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return file.getvalue()


def deb(data: bytes, compression: str = "xz") -> bytes:
    """A Debian package around a tar."""
    compress = {"xz": lzma.compress, "gz": lambda x: gzip.compress(x, mtime=0)}
    compress |= {"": bytes, "zst": lambda _: b"only dpkg-deb reads this"}
    name = f"data.tar.{compression}".rstrip(".")
    parts = {"debian-binary": b"2.0\n", "control.tar.gz": b"odd", name: compress[compression](data)}
    package = b"!<arch>\n"
    for name, part in parts.items():
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode()
        package += part + b"\n" * (len(part) % 2)
    return package


def tgz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def wheel(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def write(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
    """Writes the archive that the suffix of `path` asks for."""
    makers = {".deb": lambda m: deb(tar(m)), ".tgz": lambda m: tgz(tar(m)), ".whl": wheel}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(makers[path.suffix](members))
    return path
