"""The harness itself: R is there, and a second R is R."""

import pytest

from tests.faults.harness import STEPS, bits, digest, steps_saved


def test_the_reference_ran_to_its_end_and_kept_four_checkpoints(reference):
    assert steps_saved(reference.workdir) == [10, 20, 30, 40]
    assert list(reference.bits) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_the_same_run_twice_is_the_same_to_the_last_bit(reference, tmp_path):
    with reference.train(tmp_path / "again") as child:
        child.wait_for("SAVING 10")
        ended = child.finish()
    assert ended.code == 0, ended.text
    assert bits(tmp_path / "again") == reference.bits
    assert digest(tmp_path / "again", STEPS) == reference.digest
