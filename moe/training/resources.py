"""Disks and memories that are too small: found before a run starts, and told when they fail in it.

What a run cannot do without (checkpoints, memory) ends in a `ResourceError` with what was needed and
what to change; whatever else it writes is spared (`Spare`).
"""

from collections.abc import Callable
import contextlib
import errno
import math
import os
from pathlib import Path
import re
import resource
from typing import ParamSpec, TypeVar

from absl import logging
import jax

from moe.errors import DataError, ResourceError, UserError
from moe.training.memory import Estimate, estimate, state_bytes
from moe.training.save_failure import chain, refusal
from moe.units import memory_size

__all__ = [
    "Estimate",
    "Spare",
    "check_disk",
    "disk_failure",
    "estimate",
    "state_bytes",
    "translate",
]

# Why a write failed -> how to mend it.
DISK = {
    errno.ENOSPC: "Free space there, or lower checkpoint.keep_latest and checkpoint.keep_best",
    errno.EDQUOT: "Free some of your quota there, or lower checkpoint.keep_latest and checkpoint.keep_best",
    errno.EFBIG: "Raise the limit of a file's size (`ulimit -f unlimited`)",
    errno.EROFS: "Mount it writable again",
}
_FILE_IN_TEXT = re.compile(r"local file \"([^\"]+)\"")  # of TensorStore, which raises no OSError
_FILE_BYTES = 1 << 31  # at which TensorStore starts another data file (OCDBT's default)
_AGAIN = "the same command then goes on from the newest checkpoint"

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def check_disk(workdir: str | Path, state_bytes: int) -> None:
    """Refuses a run whose checkpoints cannot fit: the newest stays until the next one is whole.

    Free space is what the file system of `<workdir>/checkpoints` reports, which on some network disks
    is that of all users together; a quota beyond it shows only when a save fails.

    Args:
        workdir: exists; its `checkpoints` need not.
        state_bytes: of one checkpoint, `state_bytes(...)`.

    Raises:
        ResourceError: less than twice as much is free, or a limit on file sizes is below it.
    """
    folder = Path(workdir) / "checkpoints"
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed, status = 2 * state_bytes, os.statvfs(there)
    blocks = status.f_bfree if os.geteuid() == 0 else status.f_bavail
    free = blocks * status.f_frsize
    if status.f_blocks and free < needed:  # some file systems report nothing
        raise ResourceError(
            f"{folder} has {memory_size(free)} free ({free} bytes), and checkpoints need "
            f"{memory_size(needed)} ({needed} bytes): the state takes {memory_size(state_bytes)}, and the "
            "checkpoint before stays until the next is whole. Free space, choose a --workdir on a "
            "larger disk, or make the state smaller: optimizer.moment_dtype=bfloat16, a smaller model."
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = min(math.ceil(state_bytes / jax.process_count()), _FILE_BYTES)
    if limit != resource.RLIM_INFINITY and limit < largest:
        raise ResourceError(
            f"No file of this process may grow beyond {memory_size(limit)} ({limit} bytes), and a "
            f"checkpoint has files of up to {memory_size(largest)}. {DISK[errno.EFBIG]}."
        )


def translate(
    error: BaseException, estimate: Callable[[], Estimate] | None = None
) -> ResourceError | None:
    """What to tell of an error whose cause is a disk or a memory; None for any other error.

    A process that the kernel kills for want of memory hears nothing of it: it ends as by SIGKILL, and
    its checkpoints are those of a killed run.

    Args:
        error: as caught. Causes and contexts are looked through. A UserError tells for itself.
        estimate: makes one of the run; called only if memory was short.
    """
    if isinstance(error, UserError):
        return None
    told = next((one for one in chain(error) if isinstance(one, ResourceError)), None)
    if told is not None:  # and what failed on the way out covered it
        return told
    failure = disk_failure(error)
    if failure is not None:
        number, where = failure
        return ResourceError(
            f"Writing {where or 'a file of the run'} failed: {os.strerror(number)}. Checkpoints that were "
            f"whole are as they were. {DISK[number]}; {_AGAIN}."
        )
    short = next((one for one in chain(error) if _is_memory(one)), None)
    return None if short is None else _memory_error(short, estimate)


def disk_failure(error: BaseException) -> tuple[int, str | None] | None:
    """The `errno` of a full, limited or read-only disk behind an error, and the file if it is known.

    None if nothing in the chain of causes and contexts is of that kind.
    """
    number = refusal(error)
    if number is None:
        return None
    files = (one.filename for one in chain(error) if isinstance(one, OSError))
    in_text = (_FILE_IN_TEXT.search(str(one)) for one in chain(error))
    named = [str(name) for name in files if name is not None]
    named += [found[1] for found in in_text if found is not None]
    return number, named[0] if named else None


class Spare:
    """Calls what a run can go on without, and says once of each kind that it failed.

    Only what a disk or a missing file does is spared (`OSError`, `DataError`); a mistake in the program
    stays an error.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(
        self,
        what: str,
        function: Callable[Arguments, Returned],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Returned | None:
        """`function(*args)`, or None if it failed.

        Args:
            what: kind of output, as it stands in a sentence: "the report".
            function: writes it.
            *args: of the function.
            **kwargs: of the function.
        """
        try:
            return function(*args, **kwargs)
        except (OSError, DataError) as error:
            if what not in self._said:
                self._said.add(what)
                logging.warning(
                    "%s could not be written (%s). The run goes on without. This is said once.",
                    what[:1].upper() + what[1:],
                    error,
                )
        return None


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    )


def _memory_error(error: BaseException, make: Callable[[], Estimate] | None) -> ResourceError:
    where = "device" if isinstance(error, jax.errors.JaxRuntimeError) else "host"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = [f"Out of memory on the {where}: {lines[0].rstrip('.')}."]
    if make is not None:
        with contextlib.suppress(MemoryError):  # nothing is left to reckon with
            found = make()
            said += [f"Here {found}.", *found.advice]
    if where == "host" or jax.default_backend() == "cpu":
        said.append("Devices of the CPU share the memory of the host with the data readers.")
    return ResourceError(" ".join([*said, f"Change one of these; {_AGAIN}."]))
