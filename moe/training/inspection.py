"""Checkpoints looked at, verified and thinned out while no run is going."""

from collections.abc import Mapping
import contextlib
from pathlib import Path
from typing import NamedTuple

from moe.errors import CheckpointError
from moe.training import manifest, step_folder
from moe.training.catalogue import Catalogue
from moe.training.keeping import KeepRules
from moe.training.record import is_known
from moe.training.stored import content_flaws

CHECKPOINTS = "checkpoints"


class Entry(NamedTuple):
    """One step of a directory, as its files tell."""

    step: int
    size: int  # bytes
    format: int | None  # None without an intact record
    metrics: Mapping[str, float]
    flaw: str | None  # None if it can be restored as far as names and sizes tell


def checkpoints_of(path: str | Path) -> Path:
    """The directory of checkpoints that a path means: a workdir, or the directory itself.

    Raises:
        CheckpointError: If there is none.
    """
    given = Path(path).expanduser().absolute()
    inner = given / CHECKPOINTS
    directory = inner if inner.is_dir() else given
    if not directory.is_dir() or not (inner.is_dir() or step_folder.steps_in(directory)):
        raise CheckpointError(
            f"There are no checkpoints at {given}. Give the workdir of a run, or its {CHECKPOINTS}."
        )
    return directory


def entries(directory: Path, rules: KeepRules | None = None) -> list[Entry]:
    """All steps of a directory, ascending."""
    catalogue = Catalogue(directory, rules or KeepRules(), writes=False, follows=True)
    return [_entry(catalogue, step) for step in catalogue.steps]


def _entry(catalogue: Catalogue, step: int) -> Entry:
    folder, record = catalogue.folder(step), catalogue.record(step)
    size = step_folder.size(folder) if folder.is_dir() and not folder.is_symlink() else 0
    found = catalogue.flaw(step, thorough=False)
    if found is None and record is not None and not is_known(record):
        found = "it is of a format that is not read here"
    format_ = None if record is None else record["format"]
    return Entry(step, size, format_, catalogue.metrics(step), found)


def flaws(folder: Path) -> list[str]:
    """All that is not as it was written in a step, every byte read; each names its file or leaf."""
    found = step_folder.flaw(folder, thorough=True)
    if found is not None and not step_folder.read_record(folder):
        return [found]
    names = [] if found is None else [found]
    with contextlib.suppress(ValueError):  # a damaged manifest is what `found` tells
        names += [f"{name} is no file of this checkpoint" for name in manifest.extra(folder)]
    return names + list(content_flaws(folder))


def prune(directory: Path, rules: KeepRules, *, dry_run: bool) -> list[Entry]:
    """Deletes the steps that no rule keeps, and returns them. What is not ours stays.

    The caller holds the lock of the workdir, unless `dry_run`.

    Raises:
        CheckpointError: If no step there is ours, or if one cannot be deleted.
    """
    rules.check()
    catalogue = Catalogue(directory, rules, writes=not dry_run, follows=False)
    catalogue.usable()
    dropped = [_entry(catalogue, step) for step in catalogue.prune()]
    for entry in () if dry_run else dropped:
        try:
            step_folder.remove(catalogue.folder(entry.step))
        except OSError as error:
            raise CheckpointError(
                f"Checkpoint {entry.step} in {directory} could not be deleted: {error}. Make the "
                "directory writable and try again."
            ) from error
    return dropped
