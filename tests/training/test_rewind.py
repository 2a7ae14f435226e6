"""Rewinds: pure functions, and a model of the loop that is killed at every point."""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest

from moe.config import ConfigDict, default_config
from moe.training.guards import GuardState
from moe.training.rewind import first_of_row, go_back_to, plan, resume_row, rewinds, verdict, why

NOTHING = GuardState(*[np.int32(0)] * 4, np.zeros(1, np.float32), np.int32(0))


def limits(**changes) -> ConfigDict:
    config = default_config()
    config.guards.update({"bad_steps": 4, "spikes": 3, "skip_batches": 5, "rewinds": 2} | changes)
    return config.guards


def guard(**counts: int) -> GuardState:
    return NOTHING._replace(**counts)


def rewind(step: int, next_row: int, resume: int) -> dict[str, Any]:
    return {"event": "rewind", "step": step, "next_row": next_row, "resume_row": resume}


START = {"event": "start", "step": 0}


@pytest.mark.parametrize(
    ("counts", "events", "expected"),
    [
        ({}, [], "go_on"),
        ({"spikes_in_a_row": 2, "bad_in_a_row": 3, "longest_bad": 3}, [], "go_on"),
        ({"longest_bad": 4}, [], "end"),  # over since, and still seen
        ({"longest_bad": 4, "spikes_in_a_row": 3}, [], "end"),
        ({"spikes_in_a_row": 3}, [], "rewind"),
        ({"spikes_in_a_row": 9}, [START, rewind(10, 80, 120)], "rewind"),
        ({"spikes_in_a_row": 3}, [rewind(10, 80, 120)] * 2, "rewind"),  # one, written twice
        ({"spikes_in_a_row": 3}, [rewind(10, 80, 120), START, rewind(10, 120, 160)], "end"),
        ({"spikes_in_a_row": 2}, [rewind(10, 80, 120), rewind(10, 120, 160)], "go_on"),
    ],
)
def test_verdict(counts, events, expected):
    assert verdict(guard(**counts), limits(), events) == expected


def test_no_budget_ends_at_the_first_row_of_spikes():
    assert verdict(guard(spikes_in_a_row=3), limits(rewinds=0)) == "end"


def test_the_reason_names_what_was_reached_and_what_is_kept():
    told = why(guard(longest_bad=4), limits(), 30, 20)
    assert "not finite in 4 steps in a row (guards.bad_steps=4)" in told
    assert "Checkpoint 20 is kept" in told
    told = why(guard(spikes_in_a_row=3), limits(), 30, None)
    assert "guards.spikes=3" in told
    assert "guards.rewinds=2" in told
    assert "No checkpoint" in told


def test_first_of_a_row_counts_all_steps_without_an_update():
    assert first_of_row(guard(spikes_in_a_row=3), 22) == 20
    assert first_of_row(guard(spikes_in_a_row=3, bad_in_a_row=2), 22) == 18
    assert first_of_row(guard(), 22) == 23


@pytest.mark.parametrize(
    ("steps", "first", "expected"),
    [
        ([10, 20, 30], 21, 20),
        ([10, 20, 30], 20, 10),  # a checkpoint after the spike is no good
        ([10, 17], 21, 10),  # 17 was saved by an interruption
        ([17, 18], 21, 18),
        ([22, 30], 21, 22),  # all of the row: the weights are those from before it
        ([], 21, 0),
    ],
)
def test_the_checkpoint_to_go_back_to(steps, first, expected):
    assert go_back_to(steps, first, every=10) == expected
    assert go_back_to(reversed(steps), first, every=10) == expected


def planned(events=(), step=10, next_row=80, at=22, row=176, spikes=3, skip=5, size=8) -> Any:
    return plan(
        events,
        step,
        next_row,
        guard=guard(spikes_in_a_row=spikes),
        at=at,
        row=row,
        batch_size=size,
        skip_batches=skip,
    )


def test_a_rewind_skips_batches_from_the_first_that_spiked():
    assert planned() == rewind(10, 80, (19 + 5) * 8)  # steps 20, 21 and 22 spiked
    # All that spiked at least, or it would spike for ever.
    assert planned(skip=0) == rewind(10, 80, 176)
    assert planned(spikes=9, skip=5) == rewind(10, 80, 176)


def test_a_rewind_that_is_already_written_is_not_written_again():
    event = planned()
    assert planned([START, event]) is None
    assert resume_row([START, event], 10, 80) == event["resume_row"]


def test_a_second_spike_goes_on_from_the_first_rewind():
    first = rewind(10, 80, 192)
    # From row 192 again to step 20: the first spike is its 10th batch.
    second = planned([first], at=22, row=192 + 12 * 8)
    assert second == rewind(10, 192, 192 + (9 + 5) * 8)
    assert resume_row([first, second], 10, 80) == second["resume_row"]
    assert resume_row([first, second], 10, 192) == second["resume_row"]


def test_only_the_checkpoint_of_a_rewind_goes_on_elsewhere():
    events = [START, rewind(10, 80, 192), rewind(0, 0, 400), rewind(10, 480, 600)]
    assert resume_row(events, 10, 80) == 192
    assert resume_row(events, 20, 160) == 160
    assert resume_row(events, 0, 0) == 400
    assert resume_row(events, 10, 480) == 600  # of the run that began again at row 400
    assert resume_row([], 10, 80) == 80
    twice = [*events[:2], *events[:2]]
    assert resume_row(twice, 10, 80) == 192
    assert len(rewinds(twice)) == 1


# ---- a model of the loop: what a checkpoint holds is what was learned, and where


class Machine(NamedTuple):
    """One training step is to note the row of its batch, unless that is one of the bad rows."""

    bad_rows: frozenset[int]
    steps: int = 40
    every: int = 10
    size: int = 8
    log_every: int = 1
    interruptions: tuple[int, ...] = ()

    def step(self, state: tuple, row: int) -> tuple:
        learned, spikes = state
        if row in self.bad_rows:
            return learned, spikes + 1
        return (*learned, row), 0


class Killed(Exception):
    pass


class Disk:
    """What survives a kill; every action counts down to the kill."""

    def __init__(self, kill_at: int | None = None):
        self.checkpoints: dict[int, tuple[tuple, int]] = {}
        self.history: list[dict] = []
        self.left = kill_at

    def act(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Killed


class Loop:
    """The loop of the docstring, from a start to the end or the next kill."""

    def __init__(self, machine: Machine, disk: Disk, bounds: ConfigDict):
        self.machine, self.disk, self.bounds = machine, disk, bounds
        self.events = list(disk.history)
        self.go_on_from(*self.restored())

    def restored(self) -> tuple[int, tuple, int]:
        self.disk.act()
        step = max(self.disk.checkpoints, default=0)
        return step, *self.disk.checkpoints.get(step, (((), 0), 0))

    def go_on_from(self, step: int, state: tuple, next_row: int) -> None:
        self.row = resume_row(self.events, step, next_row)
        self.step, self.state = step, state if self.row == next_row else (state[0], 0)

    def run(self) -> tuple[str, tuple]:
        machine, tried = self.machine, 0
        while self.step < machine.steps:
            tried += 1
            assert tried < 500, "it never ends"
            self.disk.act()
            self.state = machine.step(self.state, self.row)
            self.step, self.row = self.step + 1, self.row + machine.size
            due = self.step % machine.every == 0
            if due or self.step % machine.log_every == 0:
                found = verdict(guard(spikes_in_a_row=self.state[1]), self.bounds, self.events)
                if found == "end":
                    return "end", self.state[0]
                if found == "rewind":
                    self.go_back()
                    continue
            self.save(due)
        return "done", self.state[0]

    def save(self, due: bool) -> None:
        stopped = self.step in self.machine.interruptions
        if due or stopped:
            self.disk.act()
            self.disk.checkpoints[self.step] = (self.state, self.row)
        if stopped:
            raise Killed

    def go_back(self) -> None:
        seen, disk = guard(spikes_in_a_row=self.state[1]), self.disk
        to = go_back_to(disk.checkpoints, first_of_row(seen, self.step), self.machine.every)
        for other in sorted(disk.checkpoints):
            if other > to:
                disk.act()
                del disk.checkpoints[other]
        step, state, next_row = self.restored()
        event = plan(
            self.events,
            step,
            next_row,
            guard=seen,
            at=self.step,
            row=self.row,
            batch_size=self.machine.size,
            skip_batches=self.bounds.skip_batches,
        )
        disk.act()
        if event is not None:
            disk.history.append(event)
            self.events.append(event)
        disk.act()
        self.go_on_from(step, state, next_row)


def survive(machine: Machine, bounds: ConfigDict, kill_at: int | None) -> tuple[Any, list[dict]]:
    disk, interruptions = Disk(kill_at), list(machine.interruptions)
    for _ in range(10):
        try:
            loop = Loop(machine._replace(interruptions=tuple(interruptions)), disk, bounds)
            return loop.run(), rewinds(disk.history)
        except Killed:
            done = max(disk.checkpoints, default=0)
            interruptions = [step for step in interruptions if step > done]
    raise AssertionError("it never ends")


def rows(*batches: int) -> frozenset[int]:
    return frozenset(8 * batch for batch in batches)


CASES = {
    "one row of spikes": (rows(19, 20, 21), "done", 1),
    "two rows": (rows(19, 20, 21, 35, 36, 37, 38), "done", 2),
    "as soon as it is back": (rows(19, 20, 21, 24, 25, 26, 27), "done", 2),
    "before the first checkpoint": (rows(4, 5, 6), "done", 1),
    "over a save": (rows(18, 19, 20, 21), "done", 1),
    "saved in a row that ended": (rows(8, 9, 19, 20, 21, 24), "done", 1),
    "too many": (rows(*range(19, 60)), "end", 2),
    "short ones are left alone": (rows(3, 4, 11, 12, 19, 20), "done", 0),
}


def skips(event: dict[str, Any], row: int) -> bool:
    return event["next_row"] <= row < event["resume_row"]


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_kill_at_any_point_changes_nothing(name, log_every):
    """Same history and same checkpoint, same continuation: every kill leads to the same weights."""
    bad_rows, ending, count = CASES[name]
    machine = Machine(bad_rows, log_every=log_every)
    bounds = limits(rewinds=count)  # just enough
    undisturbed, events = survive(machine, bounds, None)
    if log_every == 1:  # a row between two looks may be over when it is looked for
        assert undisturbed[0] == ending
        assert len(events) == count
        if ending == "done":
            final = machine.steps * machine.size + sum(
                event["resume_row"] - event["next_row"] for event in events
            )
            seen = {row for row in bad_rows if not any(skips(event, row) for event in events)}
            missing = {row for row in seen if row < final}
            assert len(undisturbed[1]) + len(missing) == machine.steps
    kills = 0
    for kill_at in itertools.count():
        disk = Disk(kill_at)
        try:
            Loop(machine, disk, bounds).run()
            break
        except Killed:
            kills += 1
        assert survive(machine, bounds, kill_at) == (undisturbed, events), kill_at
    assert kills > 30


@pytest.mark.parametrize("log_every", [1, 2])
def test_a_stop_at_any_step_changes_nothing(log_every):
    """It saves out of turn, which a rewind must not go back to."""
    machine = Machine(CASES["two rows"][0], log_every=log_every)
    undisturbed = survive(machine, limits(), None)
    assert len(undisturbed[1]) == 2
    for step in range(1, machine.steps):
        stopped = machine._replace(interruptions=(step,))
        assert survive(stopped, limits(), None) == undisturbed, step


def test_a_run_that_is_rewound_always_gets_further():
    """Every verdict "rewind" spends budget or moves on: spikes without end come to an end."""
    for skip, spikes in itertools.product((0, 1, 5), (1, 2, 3)):
        bounds = limits(skip_batches=skip, spikes=spikes, rewinds=4)
        (ending, _), events = survive(Machine(rows(*range(12, 400))), bounds, None)
        assert (ending, len(events)) == ("end", 4)
        places = [event["resume_row"] for event in events]
        assert places == sorted(set(places))
