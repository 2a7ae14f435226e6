"""Addresses of databases: where they are read from, and that their passwords are shown to nobody.

The list of processes, which all users of a machine can read, has every command line; a program's environment
and a file of its user are for that user alone.
"""

from collections.abc import Mapping, MutableMapping
import os
from pathlib import Path
import re
import stat

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from moe.errors import ConfigError

# What drivers read passwords from: for those that talk to the database, not for trainers.
PASSWORD_VARIABLES = ("PGPASSWORD", "MYSQL_PWD")
_SECRET = r"(?:\w*passw(?:or)?d|pwd|token|secret)"
_FIX = (
    "Leave it out and put it into ~/.pgpass or PGPASSWORD (PostgreSQL), or give the whole address as "
    "--storage=env:NAME, of an environment variable, or --storage=file:PATH, the first line of a file."
)


def take_address(given: str, environment: MutableMapping[str, str] | None = None) -> str:
    """The database address that a `--storage` flag means, as `openssl -passin` takes its passwords.

    Args:
        given: an address, `env:NAME` or `file:PATH`.
        environment: of this process, by default. The variable is taken out, so that no child gets it.

    Raises:
        ConfigError: nothing there, a password for all to see, or no address. Never shows what it found.
    """
    kind, _, name = given.partition(":")
    if kind == "env":
        found = (os.environ if environment is None else environment).pop(name, "").strip()
        if not found:
            raise ConfigError(
                f"--storage={given}: the environment has no {name!r}: export it before the command."
            )
    elif kind == "file":
        found = _first_line(given, Path(name).expanduser())
    else:
        found = given
        if without_password(given) != given:
            raise ConfigError(
                f"--storage={without_password(given)} had a password on the command line, which every user of "
                f"this machine can read in the list of processes. {_FIX} Change that password."
            )
    if kind in ("env", "file"):
        _check(given, found)
    return found


def _first_line(given: str, path: Path) -> str:
    try:
        mode = path.stat().st_mode
        found = path.read_text(encoding="utf-8").strip().partition("\n")[0].strip()
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"--storage={given} cannot be read: {told}.") from error
    if stat.S_IMODE(mode) & 0o077 and without_password(found) != found:
        raise ConfigError(
            f"--storage={given} holds a password and others may read it (mode "
            f"{stat.S_IMODE(mode):o}): run `chmod 600 {path}`."
        )
    return found


def _check(given: str, found: str) -> None:
    url = _parsed(found)
    if url is None:
        raise ConfigError(
            f"--storage={given}: what is there is no database address. Write one such as "
            "postgresql+psycopg://user:password@host/name."
        )
    if url.username is not None and found.count("@") > 1:
        # All after the first `@` is taken for a host, which error messages name.
        raise ConfigError(
            f"--storage={given}: only one `@` may stand in the address, before the host: write one that is "
            "part of a password as %40 (and `%` as %25)."
        )


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child that has no business with the database."""
    variables = os.environ if environment is None else environment
    return {key: value for key, value in variables.items() if key not in PASSWORD_VARIABLES}


def redacted(text: str) -> str:
    """Text without passwords of addresses: `user:SECRET@host`, `password=SECRET`."""
    text = re.sub(r"(://[^/\s:@]*):[^/\s]*@", r"\1:***@", text)
    return re.sub(rf"(?i)({_SECRET})=[^&\s'\"]+", r"\1=***", text)


def without_password(address: str) -> str:
    """A database address as it may be shown."""
    url = _parsed(address)
    if url is not None and url.password is None:
        return redacted(address)
    head, at, tail = address.rpartition("@")
    if at:
        scheme, _, user = head.partition("://")
        address = f"{scheme}://{user.partition(':')[0]}@{tail}"
    return redacted(address)


def _parsed(address: str) -> URL | None:
    try:
        return make_url(address)
    except (ArgumentError, ValueError):
        return None
