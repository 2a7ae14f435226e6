import hashlib
import importlib.util
import os
import re
import sys

import pytest

from moe.data.packages import Package, fetch
from moe.errors import DataError

DATA = b"what a registry serves" * 50
RECORDED = {"sha256": hashlib.sha256(DATA).hexdigest(), "size": len(DATA)}
PIP = Package("pip", "Some_Data", "1.0.2", **RECORDED)
APT = Package("apt", "some-data", "1:3.0-37", **RECORDED)
NPM = Package("npm", "@scope/some-data", "1.0.2", **RECORDED)
FILES = {
    PIP: "some.data-1.0.2-py3-none-any.whl",
    APT: "some-data_1%3a3.0-37_all.deb",
    NPM: "scope-some-data-1.0.2.tgz",
}
COMMANDS = {
    PIP: f"{re.escape(sys.executable)} -m pip download --no-deps .*Some_Data==1.0.2",
    APT: "apt-get .*download some-data",
    NPM: "npm pack .*@scope/some-data@1.0.2",
}
PACKAGES = pytest.mark.parametrize("package", FILES, ids=lambda package: package.client)


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Replaces all clients by one that runs a shell script in the folder of the download."""
    folder = tmp_path / "clients"
    (folder / "pip").mkdir(parents=True)
    (folder / "served").write_bytes(DATA)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def replace(script):
        text = f'#!/bin/sh\necho "$0 $@" >> {folder}/log\nSERVED={folder}/served\n{script}\n'
        for name in ("apt-get", "npm", "pip.sh"):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        call = f"[{str(folder / 'pip.sh')!r}, '-m', 'pip', *sys.argv[1:]]"
        main = f"import subprocess, sys\nsys.exit(subprocess.call({call}))\n"
        (folder / "pip" / "__init__.py").write_text("")
        (folder / "pip" / "__main__.py").write_text(main)
        return folder / "log"

    return replace


@PACKAGES
def test_fetched_once_and_kept(tmp_path, clients, package, capsys):
    log = clients(f'cp "$SERVED" {FILES[package]}')
    kept = tmp_path / "data" / "packages"
    path = fetch(package, kept)
    assert path == kept / FILES[package]
    assert path.read_bytes() == DATA
    expected = f"fetching {package.name} (0.0 MB) by {package.client}\n"
    assert capsys.readouterr().out == expected
    assert fetch(package, kept) == path
    assert capsys.readouterr().out == ""
    assert len(log.read_text().splitlines()) == 1
    assert [file.name for file in kept.iterdir()] == [FILES[package]]


@PACKAGES
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('head -c 100 "$SERVED"', "100 bytes where 1100 are recorded; SHA-256 .* is recorded"),
        ('tr w W < "$SERVED"', "is not the recorded package: SHA-256 .* is recorded"),
    ],
    ids=["short", "other"],
)
def test_another_file_is_not_kept(tmp_path, clients, package, script, message):
    clients(f"{script} > {FILES[package]}")
    with pytest.raises(DataError, match=message):
        fetch(package, tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())


@PACKAGES
def test_a_kept_file_that_was_damaged(tmp_path, clients, package):
    log = clients("exit 9")
    path = tmp_path / FILES[package]
    path.write_bytes(DATA[:-1] + b"!")
    with pytest.raises(
        DataError, match=rf"SHA-256 .*Delete {re.escape(str(path))} to have it fetched"
    ):
        fetch(package, tmp_path)
    assert not log.exists()


@PACKAGES
def test_a_client_that_fails(tmp_path, clients, package):
    lines = " ".join(f"line{i}" for i in range(9))
    clients(f'cp "$SERVED" {FILES[package]}; printf "%s\\n" {lines} >&2; exit 100')
    with pytest.raises(DataError, match=COMMANDS[package]) as error:
        fetch(package, tmp_path / "kept")
    message = str(error.value)
    assert "ended with code 100" in message
    assert message.endswith("It said: line3 | line4 | line5 | line6 | line7 | line8")
    assert f"put the file into {tmp_path / 'kept'}" in message
    assert not list((tmp_path / "kept").iterdir())


@PACKAGES
def test_a_client_that_leaves_nothing(tmp_path, clients, package):
    clients('cp "$SERVED" another_1.tgz')
    with pytest.raises(
        DataError, match=rf"{COMMANDS[package]}.* left no .* file of {package.name}"
    ):
        fetch(package, tmp_path / "kept")


@PACKAGES
def test_a_client_that_is_missing(tmp_path, monkeypatch, package):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    mend = {PIP: "ensurepip", APT: "part of Debian and Ubuntu", NPM: "comes with Node.js"}
    with pytest.raises(DataError, match=rf"{mend[package]}.*Wanted: .*{COMMANDS[package]}"):
        fetch(package, tmp_path / "kept")


def test_another_debian_version_is_announced(tmp_path, clients):
    clients("echo newer > some-data_1%3a3.0-38_all.deb")
    said = []
    path = fetch(APT, tmp_path / "kept", said.append)
    assert path.read_text() == "newer\n"
    assert said[1].startswith(
        "some-data_1%3a3.0-38_all.deb: its reader was written against version 1:3.0-37"
    )
    assert fetch(APT, tmp_path / "kept", said.append) == path
    assert len(said) == 3  # told at every use
    (tmp_path / "kept" / FILES[APT]).write_bytes(DATA)
    assert fetch(APT, tmp_path / "kept", said.append).name == FILES[APT]
    assert len(said) == 3


def test_names_that_begin_alike_are_other_packages(tmp_path, clients):
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("some-data-more_1%3a3.0-37_all.deb", "some_data-1.0.20-py3-none-any.whl"):
        (kept / name).write_bytes(b"another")
    for package in (APT, PIP):
        clients(f'cp "$SERVED" {FILES[package]}')
        assert fetch(package, kept).name == FILES[package]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Cannot keep packages in .*file/packages"):
        fetch(NPM, tmp_path / "file" / "packages")


def test_versions_of_pip_and_npm_are_fixed(tmp_path):
    for client in ("pip", "npm"):
        with pytest.raises(ValueError, match="are fixed"):
            fetch(Package(client, "some-data"), tmp_path)
