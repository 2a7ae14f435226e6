"""Errors meant for people: each names the value, the rule and the fix, and has its own exit code."""

from collections.abc import Iterable, Mapping
import difflib
import signal
from typing import TypeVar

Row = TypeVar("Row")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the known word that is most alike, or nothing if none is."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


class UserError(Exception):
    """A mistake that the user can mend. `exit_code` is what the entry points return to the shell."""

    exit_code = 1


class ConfigError(UserError):
    """A key, a value or a combination in the config that cannot work."""

    exit_code = 2


class DataError(UserError):
    """Data that is missing, unreadable, empty or not what the config says."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or made by another model."""

    exit_code = 4


class DivergedError(UserError):
    """Training that cannot go on: numbers that are not finite, or spikes beyond their budget."""

    exit_code = 5


class ResourceError(UserError):
    """A disk that is full or a memory that is too small."""

    exit_code = 6


def find_row(table: Mapping[str, Row], key: str, name: str, kind: str) -> Row:
    """The row of a table that the config picks by name.

    Args:
        table: rows by name.
        key: of the config, dotted, whose value is `name`.
        name: of the row.
        kind: what to say that it is not, where there is no such row: `not a router`.

    Raises:
        ConfigError: no such row; names the nearest.
    """
    if name in table:
        return table[name]
    raise ConfigError(
        f"{key}={name!r} is {kind}{did_you_mean(name, table)}; there are {', '.join(table)}."
    )


# A run that was alive and did nothing for too long: the watchdog ended it.
EXIT_STUCK = 70
# A run that was asked to stop (SIGTERM, Ctrl-C) and has saved its state: start it again to go on.
EXIT_PREEMPTED = 75

# How a run may end so that starting it again is worth it; the launcher, sweeps and comparisons all follow
# this. The state is saved (75), or it stood still (70), or a signal ended it that says nothing about the
# program: killed (memory, a peer that was lost, a machine that closes down) or broken by its surroundings.
# Every other end would come again: a mistake in config or data, a run that diverged, a full disk, a bug.
# A second Ctrl-C (130) is somebody's wish. `docs/reliability.md` has the table for people.
STARTED_AGAIN = frozenset(
    {EXIT_PREEMPTED, EXIT_STUCK}
    | {-n for n in (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGTERM)}
)
# So often at one place of the run: a third end there would be followed by a fourth. What counts as getting
# further is not the same: the launcher starts commands of which it knows checkpoints alone; sweeps and
# comparisons know their trainers' metrics too, and their runs may be so short that one save is all.
RESTARTS_IN_PLACE = 2
