"""What must hold after every start of a run that faults end, whatever devices each start had.

A ledger follows the run over its starts. Two executions of a step give the same bits if all steps up to
it were computed on the same devices, and nearly the same otherwise: sums are taken in another order.
What a change of devices leaves alone to the last bit is the state that is loaded, and the rows of a step.
"""

import contextlib
import json
import os
from pathlib import Path
import re
import signal
import time
from typing import NamedTuple

from moe.training import manifest
from moe.training.recording import read_records
from tests.faults.harness import digest, number_bits, steps_saved

PREEMPTED, NO_ROOM = 75, 6
TOLERANCE = 1e-3  # relative, of a loss hundreds of steps after the devices have changed
CODES = {  # of a launcher, for the endings of one of its processes
    **{"term": PREEMPTED, "int": PREEMPTED, "full": NO_ROOM},
    **{"kill": -signal.SIGKILL, "stop_kill": -signal.SIGKILL},
    **{"term_one": PREEMPTED, "kill_one": 128 + signal.SIGKILL, "stop_one": 128 + signal.SIGABRT},
}
KNOWN = {
    *("config.json", "tokenizer.json", "metrics.jsonl", "history.jsonl", "report.html"),
    *("checkpoints", "tensorboard", "eval", "choices", "quarantine", "superseded"),
}


class Layout(NamedTuple):
    """What a start runs on."""

    devices: int
    processes: int = 1

    @property
    def flags(self) -> list[str]:
        """Of the program, with as many of the devices as can be along the axis of experts."""
        expert = next(size for size in (4, 2, 1) if self.devices % size == 0)
        return [f"--cpu_devices={self.devices}", f"--config.mesh.expert={expert}"]

    def __str__(self) -> str:
        return f"{self.devices} devices of {self.processes} processes"


Past = tuple[tuple[Layout, int], ...]  # devices, and the step after which they took over


class Told(NamedTuple):
    """What the processes of one start said of themselves."""

    loaded: dict[int, set[str]]  # step: checksums of the state, of which there must be one
    saved: dict[int, list[str]]  # step: a checksum for each process
    rows: dict[int, dict[int, str]]  # step: checksums of rows by their number in the batch

    @classmethod
    def of(cls, lines: list[str]) -> "Told":
        told = cls({}, {}, {})
        for line in lines:
            if found := re.match(r"(?:\[\d+\] )?STATE (loaded|saved) (\d+) (\w+)\n", line):
                step = int(found[2])
                if found[1] == "loaded":
                    told.loaded.setdefault(step, set()).add(found[3])
                else:
                    told.saved.setdefault(step, []).append(found[3])
            elif found := re.match(r"(?:\[\d+\] )?ROWS (\d+) ([0-9a-f: ]+)\n", line):
                rows = dict(word.split(":") for word in found[2].split())
                told.rows.setdefault(int(found[1]), {}).update(
                    {int(number): row for number, row in rows.items()}
                )
        return told


class Undisturbed(NamedTuple):
    """What every other run is measured by."""

    layout: Layout
    workdir: Path
    bits: dict[int, str]
    losses: dict[int, float]
    rows: dict[int, dict[int, str]]

    @classmethod
    def of(cls, layout: Layout, workdir: Path, lines: list[str]) -> "Undisturbed":
        records = executed(workdir, 0)
        bits = {step: number_bits(record) for step, record in records.items()}
        losses = {step: record["loss/total"] for step, record in records.items()}
        return cls(layout, workdir, bits, losses, Told.of(lines).rows)


class Ledger:
    """The steps and saves of one run, over all its starts."""

    def __init__(self, undisturbed: Undisturbed):
        self._undisturbed = undisturbed
        self._pasts: dict[int, Past] = {0: ()}  # of the newest execution of each step
        self._bits: dict[tuple[Past, int], str] = {
            (((undisturbed.layout, 0),), step): bits for step, bits in undisturbed.bits.items()
        }
        self._final: dict[int, str] = {}  # bits of the newest execution of each step
        self._saved: dict[int, str] = {}
        self.widest = 0.0  # relative difference of a loss

    def add(self, layout: Layout, workdir: Path, resumed: int, lines: list[str], code: int) -> int:
        """Looks at a start that has ended; returns how many of its steps are on record."""
        told, orderly = Told.of(lines), code in (0, PREEMPTED)
        self._check_state(told, resumed, layout.processes if orderly else None)
        records = executed(workdir, resumed)
        self._check_rows(told, set(records) if orderly else set())
        past = self._pasts[resumed]
        if not past or past[-1][0] != layout:
            past = (*past, (layout, resumed))
        self._check_losses(past, records, resumed)
        return len(records)

    def _check_state(self, told: Told, resumed: int, processes: int | None) -> None:
        if resumed:
            assert told.loaded == {resumed: {self._saved[resumed]}}, (
                f"loaded {told.loaded}, and step {resumed} was saved as {self._saved[resumed]}"
            )
        for step, found in told.saved.items():
            assert len(set(found)) == 1, f"processes saved different states at {step}: {found}"
            assert processes in (None, len(found)), f"{len(found)} processes saved step {step}"
            self._saved[step] = found[0]

    def _check_rows(self, told: Told, needed: set[int]) -> None:
        """Processes that are killed may not have told all their rows."""
        wanted = self._undisturbed.rows
        wrong = [n for n, rows in told.rows.items() if not rows.items() <= wanted[n].items()]
        wrong += [n for n in needed if told.rows.get(n) != wanted[n]]
        assert not wrong, f"steps {sorted(wrong)} had other rows"

    def _check_losses(self, past: Past, records: dict[int, dict], resumed: int) -> None:
        found = {step: number_bits(record) for step, record in records.items()}
        wrong = [step for step, bits in found.items() if self._bits.get((past, step), bits) != bits]
        assert not wrong, f"losses of steps {wrong} after step {resumed} are others"
        for step, record in records.items():
            wanted = self._undisturbed.losses[step]
            difference = abs(record["loss/total"] - wanted) / abs(wanted)
            assert difference <= TOLERANCE, (
                f"the loss of step {step} is {difference:.1e} off: {past}"
            )
            self.widest = max(self.widest, difference)
            self._bits[past, step] = self._final[step] = found[step]
            self._pasts[step] = past

    def check_end(self, workdir: Path, damaged: set[int | None], batch: int) -> None:
        """Looks at what a run leaves that is done."""
        records = executed(workdir, 0)
        assert {step: number_bits(record) for step, record in records.items()} == self._final
        assert list(records) == list(self._undisturbed.bits)
        last = max(records)
        if self._pasts[last] == ((self._undisturbed.layout, 0),):
            assert digest(workdir, last) == digest(self._undisturbed.workdir, last)
        for step in steps_saved(workdir):
            place = json.loads((workdir / f"checkpoints/{step}/data/metadata").read_text())
            assert place["next_row"] == step * batch
            # A byte that nobody reads keeps a step from being whole, and not from being right.
            assert step in damaged or is_whole(workdir, step), f"{step} is not whole"
        assert not drafts(workdir)
        assert not {path.name for path in workdir.iterdir()} - KNOWN, os.listdir(workdir)
        inside = {path.name for path in (workdir / "checkpoints").iterdir()}
        assert not [name for name in inside if not name.isdigit() and name != "scores.json"]
        assert not processes_of(workdir)


# ---- of one start


def check_start(workdir: Path, resumed: int, before: int, torn: dict[str, int]) -> None:
    assert resumed >= before, f"started from {resumed}, and {before} was whole"
    left = {path for path, inode in drafts(workdir).items() if torn.get(path) == inode}
    assert not left, f"left of before: {left}"


def check_code(ending: str | None, code: int, text: str) -> None:
    expected = {0}
    if ending is not None:
        expected.add(CODES[re.sub("_(saving|evaluating)$", "", ending)])
    assert code in expected, f"{ending}: ended with {code}, not {expected}:\n{text}"


def check_gone(workdir: Path, seconds: float) -> None:
    """Nothing of a start outlives it. The kernel may still be taking the memory of what it has killed."""
    end = time.monotonic() + seconds
    while left := processes_of(workdir):
        assert time.monotonic() < end, f"processes {left} are still there"
        time.sleep(0.02)


# ---- what is seen of a workdir


def executed(workdir: Path, resumed: int) -> dict[int, dict]:
    """Records of the steps after `resumed`."""
    records = [one for one in read_records(workdir) if one["split"] == "train"]
    assert len({one["step"] for one in records}) == len(records), "a step stands twice"
    return {one["step"]: one for one in records if one["step"] > resumed}


def newest_whole(workdir: Path) -> int:
    """The newest step whose files are those that its manifest names; 0 without any."""
    if not (workdir / "checkpoints").is_dir():
        return 0
    return max((n for n in steps_saved(workdir) if is_whole(workdir, n)), default=0)


def is_whole(workdir: Path, step: int) -> bool:
    folder = workdir / "checkpoints" / str(step)
    named = (folder / manifest.MANIFEST_FILE).exists()
    return named and manifest.difference(folder, thorough=True) is None


def drafts(workdir: Path) -> dict[str, int]:
    """Unfinished checkpoints and files, with their inodes."""
    found = {}
    for folder, inside, files in os.walk(workdir):
        for name in (*inside, *files):
            if "tmp" in name.rpartition(".")[2]:
                with contextlib.suppress(FileNotFoundError):  # it was finished meanwhile
                    path = os.path.join(folder, name)
                    found[path] = os.stat(path).st_ino
    return found


def processes_of(workdir: Path) -> list[int]:
    """Processes whose command line names the workdir."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"--workdir={workdir}" in (path / "cmdline").read_text().split("\0"):
                found.append(int(path.name))
    return found
