"""Rewinds: each of the pure functions; `test_rewind_loop` has all together."""

from typing import Any

import numpy as np
import pytest

from moe.config import ConfigDict, default_config
from moe.training.guards import GuardState
from moe.training.rewind import (
    first_of_row,
    go_back_to,
    lateness,
    plan,
    resume_row,
    rewinds,
    verdict,
    why,
)

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
    told = why(guard(spikes_in_a_row=5), limits(), 30, None)
    assert "diverged at step 28: the loss spiked in 3 steps in a row (guards.spikes=3)" in told
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
        ([7, 8], 10, 0),  # where a run goes back to that was not interrupted
        ([10], 9, 0),
        ([10, 11], 11, 10),
    ],
)
def test_the_checkpoint_to_go_back_to(steps, first, expected):
    assert go_back_to(steps, first, every=10) == expected
    assert go_back_to(reversed(steps), first, every=10) == expected


@pytest.mark.parametrize(("spikes", "late"), [(0, 0), (2, 0), (3, 0), (4, 1), (9, 6)])
def test_steps_since_a_row_was_complete(spikes, late):
    assert lateness(guard(spikes_in_a_row=spikes, bad_in_a_row=2), limits()) == late


def planned(events=(), step=10, next_row=80, row=176, spikes=3, bad=0, skip=5, size=8) -> Any:
    return plan(
        events,
        step,
        next_row,
        guard=guard(spikes_in_a_row=spikes, bad_in_a_row=bad),
        row=row,
        batch_size=size,
        limits=limits(skip_batches=skip),
    )


def test_a_rewind_skips_batches_from_the_first_that_spiked():
    assert planned() == rewind(10, 80, (19 + 5) * 8)  # steps 20, 21 and 22 spiked
    # All that spiked at least, or it would spike for ever.
    assert planned(skip=0) == rewind(10, 80, 176)
    assert planned(bad=6, skip=5) == rewind(10, 80, 176)
    assert planned(bad=1) == rewind(10, 80, (18 + 5) * 8)


@pytest.mark.parametrize("skip", [0, 3, 5, 100])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_rewind_that_is_noticed_late_is_the_same(skip, bad):
    in_time = planned(skip=skip, bad=bad)
    for late in (1, 2, 10):
        assert planned(skip=skip, bad=bad, spikes=3 + late, row=176 + 8 * late) == in_time


def test_a_checkpoint_from_after_the_row_leads_on_by_a_batch():
    assert planned(step=24, next_row=192, spikes=6, row=200, skip=0) == rewind(24, 192, 200)
    assert planned(step=24, next_row=192, spikes=6, row=200, skip=6) == rewind(24, 192, 200)
    assert planned(step=24, next_row=192, spikes=6, row=200, skip=7) == rewind(24, 192, 208)


def test_a_second_spike_goes_on_from_the_first_rewind():
    first = rewind(10, 80, 192)
    # From row 192 again to step 20: the first spike is its 10th batch.
    second = planned([first], row=192 + 12 * 8)
    assert second == rewind(10, 192, 192 + (9 + 5) * 8)
    assert resume_row([first, second], 10, 80) == second["resume_row"]
    assert resume_row([first, second], 10, 192) == second["resume_row"]


def test_only_the_checkpoint_of_a_rewind_goes_on_elsewhere():
    events = [START, rewind(10, 80, 192), rewind(0, 0, 400), rewind(10, 480, 600)]
    assert resume_row(events, 10, 80) == 192
    assert resume_row(events, 20, 160) == 160
    assert resume_row(events, 5, 80) == 80  # of a run with another batch size
    assert resume_row(events, 0, 0) == 400
    assert resume_row(events, 10, 480) == 600  # of the run that began again at row 400
    assert resume_row([], 10, 80) == 80
    twice = [*events[:2], *events[:2]]
    assert resume_row(twice, 10, 80) == 192
    assert len(rewinds(twice)) == 1
