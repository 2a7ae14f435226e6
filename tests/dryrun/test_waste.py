"""Expected drops and empty rows against enumeration and simulation."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch import gpu_tiles, tpu_tiles
from moe.dryrun.waste import (
    expected_waste,
    local_tokens,
    overflow,
    resolved_exchange,
    tile_padding,
)
from tests.dryrun.common import planned


@pytest.mark.parametrize(("T", "E", "places"), [(4, 3, 1), (6, 2, 3), (5, 3, 5), (6, 3, 2)])
def test_overflow_with_one_choice_is_the_mean_over_all_cases(T, E, places):
    arrivals = [case.count(0) for case in itertools.product(range(E), repeat=T)]
    over = np.mean([max(n - places, 0) for n in arrivals])
    found = overflow("x", T, 1, E, E, places)
    assert math.isclose(found.drops, over / (T / E), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(found.padding, 1 - (T / E - over) / places, rel_tol=1e-9)


def random_loads(T: int, K: int, E: int, parts: int, draws: int) -> np.ndarray:
    """Rows for each part, `[draws parts]`: each token chooses `K` different experts at random."""
    order = np.random.default_rng(0).random((draws, T, E)).argsort(-1)[..., :K] // (E // parts)
    return np.stack([(order == part).sum((1, 2)) for part in range(parts)], axis=1)


@pytest.mark.parametrize(("parts", "rel"), [(8, 0.05), (4, 0.4), (2, 0.6)])
def test_overflow_of_different_experts_against_simulation(parts, rel):
    T, K, E = 48, 2, 8
    places = math.ceil(1.1 * T * K / parts)
    loads = random_loads(T, K, E, parts, 4000)
    drops = np.maximum(loads - places, 0).mean() / (T * K / parts)
    found = overflow("x", T, K, E, parts, places).drops
    assert found == pytest.approx(drops, rel=rel)
    if parts < E:
        assert found > drops  # overstated where a part has several experts


def test_capacity_counts_slots_of_a_group():
    run = planned("dispatch.name=capacity", "dispatch.capacity_factor=1.5", "router.k=2")
    found = expected_waste(run, 256)
    assert found is not None
    assert found.what == "6 slots an expert for each group of 16 positions"  # 1.5 * 2 * 16 / 8
    assert found == overflow(found.what, 16, 2, 8, 8, 6)
    assert 0 < found.drops < 0.1
    run = planned("dispatch.name=capacity", "router.k=2", "dispatch.capacity_multiple=8")
    assert "8 slots" in expected_waste(run, 256).what


def test_nothing_has_a_fixed_size():
    assert expected_waste(planned("dispatch.name=grouped"), 256) is None
    assert (
        expected_waste(planned("dispatch.name=capacity", "dispatch.capacity_factor=none"), 256)
        is None
    )
    assert expected_waste(planned("model.pattern=('dense',)"), 256) is None


@pytest.mark.parametrize(
    ("more", "share"), [((), 1), (("optimizer.accumulation=2",), 2), (("dispatch.chunks=2",), 2)]
)
def test_exchange_has_one_buffer_or_a_part_for_each_sender(more, share):
    common = ("dispatch.name=grouped", "dispatch.buffer_factor=1.25", "router.k=2", *more)
    T = 256 // 8 // share
    ragged = planned("dispatch.exchange=ragged", *common, fsdp=2, expert=4)
    assert local_tokens(ragged, 256) == T
    found = expected_waste(ragged, 256)
    assert found == overflow(found.what, 4 * T, 2, 8, 4, math.ceil(1.25 * T * 2))
    even = planned("dispatch.exchange=all_to_all", *common, fsdp=2, expert=4)
    parts = expected_waste(even, 256)
    assert parts == overflow(parts.what, T, 2, 8, 4, math.ceil(1.25 * T * 2 / 4))
    assert parts.drops > found.drops


def test_exchange_of_one_shard_has_no_buffer():
    run = planned(
        "dispatch.name=grouped",
        "dispatch.buffer_factor=1.25",
        "dispatch.exchange=all_to_all",
        fsdp=8,
    )
    assert resolved_exchange(run) == "none"
    assert expected_waste(run, 256) is None


def test_tiles_against_random_sizes():
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(6000, np.full(4, 0.25), size=50)  # four experts of a shard
    run = planned("dispatch.backend=blocks", "dispatch.exchange=all_to_all", fsdp=4, expert=2)
    assert tile_padding(run, 8000, 6000) == 0
    for backend, multiplied in (
        ("megablox", tpu_tiles.padded_rows),
        ("triton", lambda s: gpu_tiles.padded_rows(s, 128)),
    ):
        with run.config.unlocked():
            run.config.dispatch.backend = backend
        rows = np.mean([float(multiplied(jnp.asarray(s))) for s in sizes[:50]])
        assert tile_padding(run, 8000, 6000) == pytest.approx(rows / 6000 - 1, rel=0.15)
