"""Steps that leave the directory of checkpoints without being deleted, the same on every process."""

from collections.abc import Iterable
from pathlib import Path

import jax
from jax.experimental import multihost_utils
import numpy as np

from moe.errors import CheckpointError
from moe.training.step_folder import move_away

QUARANTINE, SUPERSEDED = "quarantine", "superseded"


def all_agree(ok: bool) -> bool:
    """Whether `ok` on every process; all of them call it."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def put_aside(directory: Path, steps: Iterable[int], kind: str, reason: str) -> None:
    """Moves steps to `<workdir>/<kind>/<step>-<n>/`; process 0 moves, all call and wait for it.

    Args:
        directory: Of the checkpoints; `<workdir>/checkpoints`.
        steps: Numbers.
        kind: `QUARANTINE` or `SUPERSEDED`.
        reason: Written to `reason.txt` there.

    Raises:
        CheckpointError: If a step cannot be moved; on every process.
    """
    root, failure = directory.parent / kind, None
    if jax.process_index() == 0:
        try:
            for step in steps:
                move_away(directory / str(step), root, reason)
        except OSError as error:
            failure = error
    if not all_agree(failure is None):
        raise CheckpointError(
            f"{reason} It has to be moved to {root} and could not be: "
            f"{failure or 'process 0 has told why'}. Make {directory.parent} writable, or move "
            "the step away by hand, and start again."
        ) from failure
