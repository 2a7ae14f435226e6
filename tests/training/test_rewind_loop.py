"""Rewinds in a model of the loop that is killed and stopped at every point."""

import itertools
from typing import Any, NamedTuple

import pytest

from moe.config import ConfigDict
from moe.training.guards import GuardState
from moe.training.rewind import first_of_row, go_back_to, plan, resume_row, rewinds, verdict
from tests.training.test_rewind import guard, limits


class State(NamedTuple):
    learned: tuple[int, ...] = ()  # rows
    spikes_in_a_row: int = 0
    bad_in_a_row: int = 0
    longest_bad: int = 0

    @property
    def guard(self) -> GuardState:
        return guard(**{name: value for name, value in self._asdict().items() if name != "learned"})


class Machine(NamedTuple):
    """One training step is to note the row of its batch, unless that spikes or is not finite."""

    spikes: frozenset[int]  # rows
    bad: frozenset[int] = frozenset()  # rows whose step is not finite
    steps: int = 40
    every: int = 10
    size: int = 8
    log_every: int = 1
    keep: int = 99  # checkpoints
    interruptions: tuple[int, ...] = ()

    def step(self, state: State, row: int, complete: int) -> State:
        learned, spikes, bad, longest = state
        if row in self.spikes or spikes >= complete:
            return State(learned, spikes + 1, bad, longest)
        if row in self.bad:
            return State(learned, spikes, bad + 1, max(longest, bad + 1))
        return State((*learned, row), 0, 0, longest)


class Killed(Exception):
    pass


class Disk:
    """What survives a kill; every action counts down to the kill."""

    def __init__(self, kill_at: int | None = None):
        self.checkpoints: dict[int, tuple[State, int]] = {}
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

    def restored(self) -> tuple[int, State, int]:
        self.disk.act()
        step = max(self.disk.checkpoints, default=0)
        return step, *self.disk.checkpoints.get(step, (State(), 0))

    def go_on_from(self, step: int, state: State, next_row: int) -> None:
        self.row = resume_row(self.events, step, next_row)
        rested = state._replace(spikes_in_a_row=0, bad_in_a_row=0)
        self.step, self.state = step, state if self.row == next_row else rested

    def run(self) -> tuple[str, dict[int, tuple[State, int]]]:
        machine, tried = self.machine, 0
        while self.step < machine.steps:
            tried += 1
            assert tried < 500, "it never ends"
            self.disk.act()
            self.state = machine.step(self.state, self.row, self.bounds.spikes)
            self.step, self.row = self.step + 1, self.row + machine.size
            due = self.step % machine.every == 0
            stopped = self.step in machine.interruptions
            looks = due or self.step % machine.log_every == 0
            found = verdict(self.state.guard, self.bounds, self.events)
            if found == "end" and (looks or stopped):
                return "end", self.left()
            if found == "rewind" and looks:
                self.go_back()
                continue
            if due or stopped:
                self.save()
            if stopped:
                raise Killed
        return "done", self.left()

    def left(self) -> dict[int, tuple[State, int]]:
        """What was saved in turn."""
        saved = self.disk.checkpoints.items()
        return {step: what for step, what in saved if step % self.machine.every == 0}

    def save(self) -> None:
        self.disk.act()
        self.disk.checkpoints[self.step] = (self.state, self.row)
        for step in sorted(self.disk.checkpoints)[: -self.machine.keep]:
            del self.disk.checkpoints[step]

    def go_back(self) -> None:
        seen, disk = self.state.guard, self.disk
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
            row=self.row,
            batch_size=self.machine.size,
            limits=self.bounds,
        )
        disk.act()
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
    "one row of spikes": (Machine(rows(19, 20, 21)), "done", 1),
    "two rows": (Machine(rows(19, 20, 21, 35, 36, 37, 38)), "done", 2),
    "two rows close together": (Machine(rows(11, 12, 13, 15, 16, 17)), "done", 1),
    "as soon as it is back": (Machine(rows(19, 20, 21, 24, 25, 26, 27)), "done", 2),
    "before the first checkpoint": (Machine(rows(4, 5, 6)), "done", 1),
    "over a save": (Machine(rows(18, 19, 20, 21)), "done", 1),
    "saved in a row that ended": (Machine(rows(8, 9, 19, 20, 21, 24)), "done", 1),
    "too many": (Machine(rows(*range(19, 60))), "end", 2),
    "short ones are left alone": (Machine(rows(3, 4, 11, 12, 19, 20)), "done", 0),
    "with steps that are not finite": (Machine(rows(12, 14, 16), rows(13, 15)), "done", 1),
    "not finite once it is complete": (Machine(rows(11, 12, 13), rows(14, 15, 16, 17)), "done", 1),
    "not finite before": (Machine(rows(16, 17, 18), rows(11, 12, 13, 14)), "end", 0),
}


def skips(event: dict[str, Any], row: int) -> bool:
    return event["next_row"] <= row < event["resume_row"]


@pytest.mark.parametrize("name", CASES)
def test_what_rewinds_lead_to(name):
    machine, ending, count = CASES[name]
    (ended, left), events = survive(machine, limits(rewinds=count), None)  # just enough
    assert (ended, len(events)) == (ending, count)
    if ending == "done":
        (learned, *_), final = left[machine.steps]
        assert final == machine.steps * machine.size + sum(
            event["resume_row"] - event["next_row"] for event in events
        )
        lost = {row for row in machine.spikes | machine.bad if row < final}
        lost -= {row for row in lost if any(skips(event, row) for event in events)}
        assert len(learned) + len(lost) == machine.steps
        assert not {row for row in learned if any(skips(event, row) for event in events)}


@pytest.mark.parametrize("log_every", [2, 3, 4, 7, 99])
@pytest.mark.parametrize("name", CASES)
def test_how_often_the_loop_looks_changes_nothing(name, log_every):
    machine, _, count = CASES[name]
    bounds = limits(rewinds=count)
    undisturbed = survive(machine, bounds, None)
    assert survive(machine._replace(log_every=log_every), bounds, None) == undisturbed


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_kill_at_any_point_changes_nothing(name, log_every):
    """Same history and same checkpoint, same continuation: every kill leads to the same weights."""
    machine, _, count = CASES[name]
    machine, bounds = machine._replace(log_every=log_every), limits(rewinds=count)
    undisturbed = survive(machine, bounds, None)
    kills = 0
    for kill_at in itertools.count():
        try:
            Loop(machine, Disk(kill_at), bounds).run()
            break
        except Killed:
            kills += 1
        assert survive(machine, bounds, kill_at) == undisturbed, kill_at
    assert kills > 10


@pytest.mark.parametrize("log_every", [1, 2, 7, 99])
@pytest.mark.parametrize("name", CASES)
def test_a_stop_at_any_step_changes_nothing(name, log_every):
    """It saves out of turn, which a rewind must not go back to."""
    machine, _, count = CASES[name]
    machine, bounds = machine._replace(log_every=log_every), limits(rewinds=count)
    undisturbed = survive(machine, bounds, None)
    for step in range(1, machine.steps):
        stopped = machine._replace(interruptions=(step,))
        assert survive(stopped, bounds, None) == undisturbed, step


@pytest.mark.parametrize("skip", [0, 5])
@pytest.mark.parametrize("name", CASES)
def test_a_stop_that_leaves_one_checkpoint_still_leads_on(name, skip):
    """Even one from after the row was complete: the run goes on from there, and once only."""
    machine, _, count = CASES[name]
    bounds = limits(rewinds=count, skip_batches=skip)
    for step in range(1, machine.steps):
        stopped = machine._replace(interruptions=(step,), keep=1, log_every=99)
        (ended, left), events = survive(stopped, bounds, None)
        assert len(events) <= count
        if ended == "done":
            learned = left[machine.steps][0].learned
            assert sorted(set(learned)) == list(learned), step


def test_a_run_that_is_rewound_always_gets_further():
    """Every verdict "rewind" spends budget or moves on: spikes without end come to an end."""
    for skip, spikes in itertools.product((0, 1, 5), (1, 2, 3)):
        bounds = limits(skip_batches=skip, spikes=spikes, rewinds=4)
        (ending, _), events = survive(Machine(rows(*range(12, 400))), bounds, None)
        assert (ending, len(events)) == ("end", 4)
        places = [event["resume_row"] for event in events]
        assert places == sorted(set(places))
