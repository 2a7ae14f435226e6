"""Addresses of databases: where they come from, and that nobody sees their passwords."""

from pathlib import Path
import time

import pytest

from moe.errors import CheckpointError, ConfigError
from moe.sweep.address import child_environment, take_address, without_password
from moe.sweep.load import load_sweep
from moe.sweep.run import run_sweep
from tests.faults.test_sweeps import PATIENCE, SECRETS, command_line, descendants, start
from tests.sweep.common import COMMAND, write_sweep

ADDRESS = "postgresql+psycopg://me:hush@host/name"


def write(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "address.txt"
    path.write_text(text)
    path.chmod(mode)
    return f"file:{path}"


def test_an_address_is_given_or_stands_in_the_environment_or_in_a_file(tmp_path):
    variables = {"SWEEP_DB": f" {ADDRESS}\n", "OTHER": "stays"}
    assert take_address("env:SWEEP_DB", variables) == ADDRESS
    assert variables == {"OTHER": "stays"}, "no child inherits it"
    assert take_address(write(tmp_path, f"{ADDRESS}\nnotes\n")) == ADDRESS
    for plain in (
        "postgresql+psycopg://me@host/name",
        "sqlite:////data/me:x@y.db",
        "mysql://h/n?x=1",
    ):
        assert take_address(plain) == plain
        assert take_address(write(tmp_path, plain, 0o644)) == plain, "no password, no secret"


@pytest.mark.parametrize(
    "address",
    [
        ADDRESS,
        "postgresql+psycopg://me:hush/#?@host/name",
        "postgresql+psycopg://me:hush@host:port/name",
        "postgresql+psycopg://me:x@hush@host/name",
        "postgresql+psycopg://host/name?user=me&password=hush",
        "postgresql+psycopg://me@host/name?sslpassword=hush",
        "sqlite:///file:x.db?uri=true&PWD=hush",
    ],
)
def test_a_password_on_the_command_line_is_refused_and_not_shown_again(address):
    with pytest.raises(ConfigError, match="list of processes") as error:
        take_address(address)
    assert "hush" not in str(error.value)
    assert "--storage=env:NAME" in str(error.value)


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (ADDRESS, 0o640, r"others may read it \(mode 640\): run `chmod 600"),
        (ADDRESS, 0o604, "chmod 600"),
        ("hush", 0o600, "no database address"),
        ("", 0o600, "no database address"),
        ("postgresql://me:hu@hush/x@host/name", 0o600, "%40"),
        (None, 0o600, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_not_shown(tmp_path, text, mode, message):
    given = f"file:{tmp_path / 'absent'}" if text is None else write(tmp_path, text, mode)
    with pytest.raises(ConfigError, match=message) as error:
        take_address(given)
    assert "hush" not in str(error.value)


def test_a_variable_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"env:SWEEP_DB: the environment has no 'SWEEP_DB'"):
        take_address("env:SWEEP_DB", {"SWEEP_DB": ""})


def test_trainers_get_no_password_of_the_database():
    variables = {"PGPASSWORD": "x", "MYSQL_PWD": "x", "PGPASSFILE": "kept", "PATH": "kept"}
    assert set(child_environment(variables).values()) == {"kept"}
    assert without_password("sqlite:////data/me:x@y.db") == "sqlite:////data/me:x@y.db"


def test_no_output_of_a_sweep_has_the_password_of_its_database(tmp_path, monkeypatch):
    """Grepped: all files, what is printed, command lines of all processes; a trainer prints its environment."""
    work = tmp_path / "work"
    path = write_sweep(
        tmp_path / "sweep.py",
        overrides={"steps": 20, "optimizer.learning_rate": 0.05},
        space={"data.text_feature": {"values": ["text", "tells"]}},
    )
    # SQLite takes any parameter of an address that it does not know for a remark.
    database = f"{tmp_path}/study.db"
    address = f"sqlite:///file:{database}?uri=true&password=hush"
    for name, value in {"SWEEP_DB": address, "PGPASSWORD": "hush2", "SHOWN": "yes"}.items():
        monkeypatch.setenv(name, value)
    seen = set()
    with start(path, work, "--storage=env:SWEEP_DB") as sweep:
        end = time.monotonic() + PATIENCE
        while sweep.poll() is None and time.monotonic() < end:
            seen |= {command_line(pid) for pid in (sweep.pid, *descendants(sweep.pid))}
            time.sleep(0.05)
        printed, _ = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 0, printed
    assert "1 of 2 points failed" in printed
    assert "--storage=env:SWEEP_DB" in printed, "the command that runs it again"
    Path(database).write_bytes(b"not a database" * 500)
    with pytest.raises(CheckpointError, match=r"password=\*\*\*") as error:
        run_sweep(load_sweep(path), work, command=COMMAND, storage=address)
    outputs = [printed.encode(), str(error.value).encode(), *seen]
    outputs += [file.read_bytes() for file in work.rglob("*") if file.is_file()]
    everything = b"\n".join(outputs)
    assert f"{work}/trials/1/.lock'".encode() in everything, "the trainer keeps the claim"
    told = [b"'SHOWN': 'yes'", b"fake_train.py", b"moe.sweep.worker", b"exit code 6", b"<h2>"]
    assert all(text in everything for text in told), "what must be grepped is there"
    assert not any(secret.encode() in everything for secret in SECRETS)
