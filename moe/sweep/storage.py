"""The database of a study, which may go away for a while, fill its disk or be damaged.

A database that is busy or away is waited for. Anything else, and a wait that was too long, becomes one
paragraph; the runs are on disk and the same command goes on with them.
"""

from collections.abc import Callable, Generator
import contextlib
import errno
import functools
import json
import re
import sqlite3
import time
from typing import Any
import uuid

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
import sqlalchemy
import sqlalchemy.exc

from moe.errors import CheckpointError, ConfigError, ResourceError, UserError
from moe.sweep.address import redacted, without_password

PATIENCE_SECONDS = 120.0  # that a worker waits for a database that is away
PAUSE_SECONDS = 0.5
SQLITE_SECONDS = 60  # workers write one at a time to SQLite: a busy file is waited for
CREATIONS = 5  # tries to make the tables: of machines that start at once, one makes them

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
GO_ON = "Runs and their checkpoints are as they were: then run the same command, and it goes on."

# What a driver of PostgreSQL is told: text is text, also from a server of no encoding (locale C), and
# a dead connection is noticed in seconds, not hours.
_POSTGRES = {
    "client_encoding": "utf8",
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}

# Of Optuna's storage, what goes to the database. Each may be called twice with the effect of once, or
# fails the second time as it would on a trial that another worker finished.
_CALLS = (
    *("create_new_study", "create_new_trial", "_create_new_trial"),
    *("set_study_user_attr", "set_study_system_attr"),
    *("set_trial_param", "_set_trial_param", "set_trial_state_values"),
    *("set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr"),
    *("get_study_id_from_name", "get_study_name_from_id", "get_study_directions"),
    *("get_study_user_attrs", "get_study_system_attrs", "get_all_studies"),
    *("get_trial", "get_all_trials", "_get_trials", "get_trial_id_from_study_id_trial_number"),
)


class PatientStorage(RDBStorage):
    """Optuna's storage, which waits while the database is busy or away.

    Args:
        url: Optuna address.
        patience: seconds that one call waits.
        hurry: asked while waiting; once true, nothing is waited for.
    """

    def __init__(self, url: str, patience: float, hurry: Callable[[], bool]):
        self.patience, self.hurry = patience, hurry
        _retry(self, lambda: super(PatientStorage, self).__init__(url, _engine_options(url)))

    def swap(self, trial_id: int, key: str, old: Any, new: Any) -> bool:
        """Replaces a user attribute if its value is still `old` (None: if there is none).

        Of several that try at once, on any machines, one is told True: the database decides.
        """
        return _retry(self, lambda: self._swap(trial_id, key, old, new))

    def _swap(self, trial_id: int, key: str, old: Any, new: Any) -> bool:
        names = ("trial_id", "key", "value_json")
        table = sqlalchemy.table("trial_user_attributes", *map(sqlalchemy.column, names))
        row = {"trial_id": trial_id, "key": key, "value_json": json.dumps(new)}
        try:
            with self.engine.begin() as connection:
                if old is None:
                    connection.execute(table.insert().values(row))
                    return True
                same = [table.c[n] == row[n] for n in names[:2]]
                change = table.update().where(*same, table.c.value_json == json.dumps(old))
                return connection.execute(change.values(row)).rowcount == 1
        except sqlalchemy.exc.IntegrityError:
            return False


def _patient(method: Callable) -> Callable:
    @functools.wraps(method)
    def call(self: PatientStorage, *arguments: Any, **named: Any) -> Any:
        return _retry(self, lambda: method(self, *arguments, **named))

    return call


for _name in _CALLS:
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))


def _retry(storage: PatientStorage, call: Callable[[], Any]) -> Any:
    end = time.monotonic() + storage.patience
    while True:
        try:
            return call()
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
            if not _passes(error) or storage.hurry() or time.monotonic() > end:
                raise
        time.sleep(PAUSE_SECONDS)


def open_storage(url: str, *, first: bool = False) -> RDBStorage:
    """The storage of a program that has just been started, which waits for nothing.

    Args:
        url: Optuna address.
        first: whether tables may have to be made, perhaps by two machines at once.
    """
    for attempt in range(CREATIONS if first else 1):
        try:
            return PatientStorage(url, 0.0, lambda: False)
        except (sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.IntegrityError):
            if attempt == CREATIONS - 1:
                raise
            time.sleep(PAUSE_SECONDS)
    raise AssertionError("at least one attempt is made")


def _engine_options(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": SQLITE_SECONDS}}
    # A connection that broke while it was not used is replaced when it is taken.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if re.match(r"postgresql(\+psycopg2?)?:", url):
        options["connect_args"] = _POSTGRES
    return options


def new_token() -> str:
    """A name that nobody else has."""
    return uuid.uuid4().hex


@contextlib.contextmanager
def explained(url: str, *, opening: bool = False) -> Generator[None]:
    """Turns what a database or a full disk raises inside into an error for people.

    Args:
        url: Optuna address, named without its password.
        opening: whether the address itself may be wrong.

    Raises:
        ResourceError: the disk is full, or the database is busy or away for too long.
        CheckpointError: the database is damaged.
        ConfigError: while opening: an address that leads to no database.
    """
    try:
        yield
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        told = _explain(error, without_password(url), opening)
        if told is None:
            raise
        raise told from error
    except (ImportError, ValueError) as error:
        if not opening:
            raise
        raise _no_database(error, without_password(url)) from error


def _explain(error: BaseException, address: str, opening: bool) -> UserError | None:
    cause = _cause(error)
    if isinstance(cause, OSError):
        return _of_disk(cause)
    name = getattr(cause, "sqlite_errorname", "")
    if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB") or "no such table" in str(cause):
        return CheckpointError(
            f"--storage={address} is damaged ({cause}): nothing was changed. Restore it from a copy. "
            "Without one, move it away and run the same command: points of a grid or of random "
            "search have the numbers and folders they had, and their finished runs are read, not "
            "trained again."
        )
    if name.startswith("SQLITE"):
        return ResourceError(
            f"--storage={address} cannot be written or read ({cause}). Free some room, let other "
            f"programs release the file, or make it writable. {GO_ON}"
        )
    if opening:
        return _no_database(cause, address)
    return ResourceError(
        f"--storage={address}: the database is away or refuses ({_first_line(cause)}). See that it "
        f"runs and can be reached. {GO_ON}"
    )


def _of_disk(error: OSError) -> ResourceError | None:
    if error.errno not in FULL:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return ResourceError(f"{where}{error.strerror}. Free some room, or mount it writable. {GO_ON}")


@contextlib.contextmanager
def on_disk() -> Generator[None]:
    """Turns a full or broken disk inside into a ResourceError."""
    try:
        yield
    except OSError as error:
        told = _of_disk(error)
        if told is None:
            raise
        raise told from error


def _no_database(error: BaseException, address: str) -> ConfigError:
    return ConfigError(
        f"--storage={address}: Optuna cannot open it ({type(error).__name__}: {_first_line(error)}). "
        "Give a database address such as sqlite:////data/sweep.db or "
        "postgresql+psycopg://user@host/name (python3 -m pip install -e '.[postgres]'), or env:NAME or "
        "file:PATH of where it stands."
    )


def _passes(error: BaseException) -> bool:
    """Whether waiting may help: a lock or a connection, but no damage, no full disk, no wrong SQL."""
    cause = _cause(error)
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
    wrapped = [e for e in _chain(error) if isinstance(e, sqlalchemy.exc.DBAPIError)]
    return any(
        isinstance(e, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError))
        or e.connection_invalidated
        for e in wrapped
    )


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in found:
        found.append(step)
        step = step.__cause__
    return found


def _cause(error: BaseException) -> BaseException:
    """What the driver said, beneath what SQLAlchemy and Optuna made of it."""
    last = _chain(error)[-1]
    return getattr(last, "orig", None) or last


def _first_line(error: BaseException) -> str:
    return redacted(str(error).strip().partition("\n")[0])
