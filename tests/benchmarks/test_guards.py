"""The benchmark of guards and verification at tiny sizes: what it compares, not its times."""

from functools import partial

import jax
import numpy as np
import pytest

from benchmarks import guards
from benchmarks.model_run import Training, random_run
from moe import cli, setup
from moe.parallel.mesh import make_mesh
from tests.benchmarks.test_sections import SMALL


@pytest.fixture
def one_device(monkeypatch):
    one = partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(setup, "make_mesh", lambda **_: one())


def test_the_step_without_guards_is_the_same_step_without_a_condition(one_device):
    run = random_run(cli.load_config(guards.CONFIG, SMALL))
    guarded = Training(run)
    with guards.without_guards():
        bare = Training(run)
    assert "conditional" in guarded.text
    assert "conditional" not in bare.text
    assert bare.compiled.cost_analysis()["flops"] < guarded.compiled.cost_analysis()["flops"]
    for training in (guarded, bare):
        training()
    ours, theirs = (jax.tree.leaves(training.state.params) for training in (guarded, bare))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert int(guarded.state.guard.filled) == 1
    assert int(bare.state.guard.filled) == 0


def test_calls_beside_a_step_are_told_in_microseconds(monkeypatch):
    monkeypatch.setattr(guards, "CALLS", 20)
    assert list(guards.host_calls()) == ["beat", "requested", "Patient"]
    assert all(abs(timed()) < 1.0 for timed in guards.host_calls().values())


def test_a_save_is_compared_with_plain_orbax():
    stall, whole, closed = guards.save_rows(2, 4)
    assert (stall.bound, whole.bound, closed.bound) == (None, 1.10, 1.10)
    assert [len(row.above) for row in (stall, whole, closed)] == [2, 2, 2]
    for side in ("above", "below"):
        times = zip(*(getattr(row, side) for row in (stall, whole, closed)), strict=True)
        assert all(0 < going_on < on_disk <= end for going_on, on_disk, end in times)
