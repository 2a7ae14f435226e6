"""What is done on disk around the saves of a run: cleaning before, a manifest and deletions after."""

from collections.abc import Iterable
from pathlib import Path
import threading

from absl import logging

from moe.errors import CheckpointError
from moe.training import manifest, step_folder


class Finisher:
    """Writes manifests and deletes steps in a thread, one save at a time.

    Args:
        directory: Of the checkpoints.
        works: Whether this process is the one that does it; otherwise nothing happens.
    """

    def __init__(self, directory: Path, *, works: bool):
        self._directory = directory
        self._works = works
        self._thread: threading.Thread | None = None

    def clean(self) -> None:
        """Deletes what saves that never finished have left.

        Raises:
            CheckpointError: If it cannot be deleted.
        """
        try:
            if self._works and self._directory.is_dir():
                step_folder.clean(self._directory)
        except OSError as error:
            raise CheckpointError(
                f"What a save that did not finish has left in {self._directory} cannot be "
                f"removed: {error}. Make it writable, or remove it by hand."
            ) from error

    def start(self, step: int, dropped: Iterable[int]) -> None:
        """Starts the manifest of a step that is on disk, then the deletion of others."""
        self.join()
        if self._works:
            arguments = (self._directory, step, list(dropped))
            self._thread = threading.Thread(target=finish, args=arguments, name="finish save")
            self._thread.start()

    def join(self) -> None:
        """Blocks until all that was started is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def finish(directory: Path, step: int, dropped: Iterable[int]) -> None:
    """Writes the manifest of a step and deletes others; what fails is warned of and left."""
    try:
        manifest.write(directory / str(step))
    except OSError as error:
        logging.warning(
            "Checkpoint %d is whole, and its manifest was not written: %s. It is verified by the "
            "digests of its leaves alone.",
            step,
            error,
        )
    for old in dropped:
        try:
            step_folder.remove(directory / str(old))
        except OSError as error:
            logging.warning("Checkpoint %d is not kept, and could not be deleted: %s", old, error)
