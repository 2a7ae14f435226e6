"""What a failed save is called: a disk that refuses bytes is told apart from all else."""

from collections.abc import Iterator
import errno
import os
from pathlib import Path

from moe.errors import CheckpointError, ResourceError, UserError

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_ADVICE = {
    errno.ENOSPC: "Free space on that disk",
    errno.EDQUOT: "Free space within your quota",
    errno.EFBIG: "Raise the limit on the size of a file (`ulimit -f`)",
    errno.EROFS: "Make the disk writable, which a fault may have turned read-only",
}


def save_error(
    directory: Path, step: int, error: BaseException, *, needed: int, earlier: list[int]
) -> UserError:
    """The error to raise for a save that failed.

    Args:
        directory: Of the checkpoints.
        step: That was to be saved.
        error: Of the array store, with its causes.
        needed: Bytes of the state.
        earlier: Steps that are there.

    Returns:
        ResourceError where the disk is the cause, CheckpointError otherwise.
    """
    number = refusal(error)
    kept = f"Earlier steps {earlier} are as they were."
    if number is None:
        return CheckpointError(
            f"Checkpoint {step} was not saved in {directory}: {root_cause(error)}. {kept} Check "
            "space and permissions there, then run the same command again to continue from the "
            "newest."
        )
    return ResourceError(
        f"Checkpoint {step} was not saved in {directory}: {os.strerror(number)} "
        f"({errno.errorcode[number]}). It needs up to {needed} bytes; {_free(directory)} are free. "
        f"{kept} {_ADVICE[number]}, then run the same command again to continue from the newest."
    )


def refusal(error: BaseException) -> int | None:
    """The error number with which a disk refused bytes, anywhere in the chain of causes.

    Array stores turn the number into text, so the text of each error is searched as well.
    """
    for cause in chain(error):
        if isinstance(cause, OSError) and cause.errno in _REFUSALS:
            return cause.errno
        for number in _REFUSALS:
            if os.strerror(number).lower() in str(cause).lower():
                return number
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, its members if it is a group, and all that led to it."""
    waiting, seen = [error], set()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting += getattr(cause, "exceptions", ())
        waiting += [led for led in (cause.__cause__, cause.__context__) if led is not None]


def root_cause(error: BaseException) -> str:
    """Type and first line of the error at the start of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": .")


def _free(directory: Path) -> int | str:
    try:
        disk = os.statvfs(directory)
    except OSError:
        return "an unknown number"
    return disk.f_bavail * disk.f_frsize
