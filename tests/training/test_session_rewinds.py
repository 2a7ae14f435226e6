"""What the loop does with a verdict: which states are saved, and where a restored run goes on."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from moe.config import default_config
from moe.errors import DivergedError
from moe.session import Place, Session, heeded, past_rewinds
from moe.training.patience import Patient
from moe.training.state import TrainState
from tests.training.test_rewind import START, guard, rewind
import train


def session(events: list[dict]) -> Session:
    """As much of one as a verdict asks."""
    config = default_config()
    config.guards.update({"bad_steps": 4, "spikes": 3, "rewinds": 1})
    parts: dict[str, Any] = dict.fromkeys(Session._fields)
    tokenizer = SimpleNamespace(to_json=lambda: "{}")
    parts["run"] = SimpleNamespace(config=config, data=SimpleNamespace(tokenizer=tokenizer))
    parts["checkpointer"] = mock.Mock(latest_step=lambda: 10)
    parts["batches"] = mock.Mock()
    return Session(**(parts | {"events": events}))


def state(**counts: int) -> TrainState:
    return TrainState(np.int32(22), {}, {}, (), guard(**counts))


def saver(s: Session) -> Any:
    return s.checkpointer.save


USED = [START, rewind(10, 80, 120)]


@pytest.mark.parametrize(
    ("counts", "events"),
    [({"longest_bad": 4}, []), ({"spikes_in_a_row": 3}, USED), ({"spikes_in_a_row": 9}, USED)],
)
def test_a_state_that_ends_the_run_is_not_saved(counts, events):
    s = session(events)
    with pytest.raises(DivergedError, match="Checkpoint 10 is kept"):
        heeded(s, 22, guard(**counts))
    with pytest.raises(DivergedError):
        train.save(s, 22, state(**counts))
    saver(s).assert_not_called()


@pytest.mark.parametrize(("spikes", "verdict"), [(0, "go_on"), (2, "go_on"), (5, "rewind")])
def test_a_save_out_of_turn_leaves_a_rewind_to_the_next_start(spikes, verdict):
    s = session([START])
    train.save(s, 22, state(spikes_in_a_row=spikes))
    saver(s).assert_called_once()
    assert heeded(s, 22, guard(spikes_in_a_row=spikes)) == verdict


@pytest.mark.parametrize(("step", "row"), [(10, 120), (20, 80)])
def test_a_restored_run_goes_on_past_the_rewinds_that_led_to_its_checkpoint(step, row):
    batches = mock.Mock(spec=Patient)
    batches.get_state.return_value = {"seed": 1, "next_row": 80}
    place = Place(step, state(skipped=7, spikes_in_a_row=5, bad_in_a_row=2, longest_bad=2), False)
    found = past_rewinds(place, batches, USED)
    if row == 80:
        assert found is place
        batches.set_state.assert_not_called()
    else:
        batches.set_state.assert_called_once_with({"seed": 1, "next_row": row})
        assert tuple(int(count) for count in found.state.guard[:4]) == (7, 0, 2, 0)
