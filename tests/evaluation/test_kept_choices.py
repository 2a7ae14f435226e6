"""Choices in the workdir: saturation and churn without a second look at a checkpoint."""

import numpy as np
import pytest

from moe.evaluation.kept_choices import (
    Kept,
    churn_metrics,
    forget_after,
    keep,
    kept_rows,
    read,
    saturation_curve,
)

E = 8


def choices(seed: int) -> np.ndarray:
    """[L R S K] of different experts, some of them none."""
    rng = np.random.default_rng(seed)
    expert = rng.random((2, 3, 500, E)).argsort(axis=-1)[..., :2].astype(np.int32)
    expert[0, 0, :50] = -1
    return expert


def settling(steps: int = 4) -> list[Kept]:
    """Half of the tokens that differ from the last choices settle from one step to the next."""
    start, final = choices(0), choices(1)
    settled = np.random.default_rng(2).random(start.shape[1:3])[None, ..., None]
    shares = [1.0 - 0.5**i for i in range(steps - 1)] + [1.0]
    return [
        Kept(10 * i + 5, np.where(settled < share, final, start), E)
        for i, share in enumerate(shares)
    ]


def test_files_hold_the_choices_and_go_with_a_rewind(tmp_path):
    made = settling()
    for kept in reversed(made):
        keep(tmp_path, "valid", kept)
    found = read(tmp_path, "valid")
    for ours, theirs in zip(found, made, strict=True):
        assert (ours.step, ours.num_experts) == (theirs.step, E)
        np.testing.assert_array_equal(ours.expert, theirs.expert)
        assert ours.expert.dtype == np.int32
    assert {path.name for path in (tmp_path / "choices").iterdir()} == {
        f"valid-{step}.npz" for step in (5, 15, 25, 35)
    }
    assert read(tmp_path, "test") == []
    forget_after(tmp_path, 15)
    assert [kept.step for kept in read(tmp_path, "valid")] == [5, 15]


def test_what_does_not_compare_is_left_out(tmp_path):
    for step, expert in ((1, choices(0)[:1]), (2, choices(0)), (3, choices(1))):
        keep(tmp_path, "valid", Kept(step, expert, E))
    (tmp_path / "choices" / "valid-4.npz").write_bytes(b"PK half of a file")
    assert [kept.step for kept in read(tmp_path, "valid")] == [2, 3]


def test_curve_rises_to_the_last_choices():
    made = settling()
    curve = saturation_curve(made)
    assert curve["steps"] == [5, 15, 25]
    shares = np.array(curve["per_layer"])
    chance = 2 / E
    expected = [chance, 0.5 + 0.5 * chance, 0.75 + 0.25 * chance]
    np.testing.assert_allclose(shares.mean(axis=1), expected, atol=0.03)
    assert saturation_curve([made[0], made[0]])["per_layer"] == [[1.0, 1.0]]
    assert saturation_curve(made[:1]) == {"steps": [], "per_layer": []}


def test_churn_is_against_the_evaluation_before():
    made = settling()
    assert churn_metrics(made[:1]) == {}
    found = churn_metrics(made)
    last = saturation_curve(made)["per_layer"][-1]
    np.testing.assert_allclose(found["routing/per_layer/saturation"], last)
    assert found["routing/churn"] == pytest.approx(1.0 - np.mean(last))


@pytest.mark.parametrize(
    ("batch", "length", "rows"), [(16, 256, 16), (32, 256, 16), (4, 9000, 1), (3, 16, 3)]
)
def test_a_few_thousand_tokens_in_whole_rows(batch, length, rows):
    assert kept_rows(batch, length) == rows
