"""Who chose whom, evaluation after evaluation: router saturation and churn of a run (M11).

Every evaluation routes the same text, so the choices of its first rows, kept in the workdir as
`choices/<split>-<step>.npz`, tell how routing settles: against the last ones they give saturation,
against the ones before churn. No checkpoint has to be loaded again, and none has to be kept.
"""

from collections.abc import Sequence
import io
from pathlib import Path
import re
from typing import Any, NamedTuple
import zipfile
import zlib

from jaxtyping import Int
import numpy as np

from moe.data.archives import largest
from moe.evaluation import routing_analysis as analysis
from moe.evaluation.compare import overlap_metrics
from moe.training.workdir import write_atomically

DIRECTORY = "choices"
KEPT_TOKENS = 4096  # of an evaluation's first batch, at most, in whole rows; one row at least
_NAME = re.compile(r"(?P<split>.+)-(?P<step>\d+)\.npz")
# What a zip of arrays may raise: cut, flipped, encrypted, of an unknown method, of absurd sizes.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error),
    *(RuntimeError, TypeError, OverflowError, MemoryError),
)


class Kept(NamedTuple):
    """The choices of one evaluation."""

    step: int
    expert: Int[np.ndarray, "L R S K"]  # -1 for none
    num_experts: int


def kept_rows(batch_size: int, sequence_length: int) -> int:
    """How many rows of the first batch are kept."""
    return max(1, min(batch_size, KEPT_TOKENS // sequence_length))


def keep(workdir: Path, split: str, kept: Kept) -> None:
    """Writes the choices of an evaluation, whole or not at all."""
    path = workdir / DIRECTORY / f"{split}-{kept.step}.npz"
    path.parent.mkdir(exist_ok=True)
    data = io.BytesIO()
    smallest = np.min_scalar_type(-kept.num_experts)
    np.savez_compressed(
        data, expert=kept.expert.astype(smallest), num_experts=np.int32(kept.num_experts)
    )
    write_atomically(path, data.getvalue())


def forget_after(workdir: Path, step: int) -> None:
    """Drops the choices of evaluations after `step`: a run that goes on from there does them again."""
    for path, found in _files(workdir):
        if int(found["step"]) > step:
            path.unlink()


def read(workdir: Path, split: str) -> list[Kept]:
    """The choices kept of a split in the order of steps, of the shape that the last ones have.

    Files that cannot be read, half written by a machine that died say, are left out.
    """
    kept = []
    for path, found in _files(workdir):
        if found["split"] == split:
            try:
                with path.open("rb") as data, np.load(data, allow_pickle=False) as file:
                    _check_size(path, file)
                    expert, experts = file["expert"].astype(np.int32), int(file["num_experts"])
            except _UNREADABLE:
                continue
            if expert.ndim != 4 or experts < 1:
                continue
            kept.append(Kept(int(found["step"]), expert, experts))
    kept.sort(key=lambda k: k.step)
    return [k for k in kept if _shape(k) == _shape(kept[-1])]


def _check_size(path: Path, file: Any) -> None:
    """Raises ValueError for arrays that would fill the memory: zeros pack to a thousandth."""
    if sum(info.file_size for info in file.zip.infolist()) > largest(path.stat().st_size):
        raise ValueError(f"{path} unpacks to too much")


def _files(workdir: Path) -> list[tuple[Path, re.Match[str]]]:
    matches = [(path, _NAME.fullmatch(path.name)) for path in (workdir / DIRECTORY).glob("*.npz")]
    return [(path, found) for path, found in matches if found is not None]


def _shape(kept: Kept) -> tuple:
    return (*kept.expert.shape[:3], kept.num_experts)


def history(workdir: Path, split: str, step: int) -> tuple[dict[str, Any], dict[str, list]]:
    """`churn_metrics` and `saturation_curve` of the evaluation of `step`; nothing where it left none."""
    kept = [k for k in read(workdir, split) if k.step <= step]
    if not kept or kept[-1].step != step:
        return {}, {}
    return churn_metrics(kept), saturation_curve(kept)


def churn_metrics(kept: Sequence[Kept]) -> dict[str, Any]:
    """`routing/saturation` and `routing/churn` of the last choices but one against the last."""
    if len(kept) < 2:
        return {}
    before, now = kept[-2:]
    return overlap_metrics(analysis.overlap_counts(before.expert, now.expert, now.num_experts))


def saturation_curve(kept: Sequence[Kept]) -> dict[str, list]:
    """How much of the last choices each evaluation has made already.

    Returns:
        `steps`, ascending, the last one left out; and `per_layer`, for each of them `L` shares.
    """
    *earlier, final = kept
    shares = [
        analysis.saturation(analysis.overlap_counts(k.expert, final.expert, k.num_experts))
        for k in earlier
    ]
    return {"steps": [k.step for k in earlier], "per_layer": [s.tolist() for s in shares]}
