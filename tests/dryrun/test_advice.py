"""Sentences for records that do not fit or waste."""

from typing import Any

import pytest

from moe.dryrun.advice import advice
from tests.dryrun.common import planned

GIB = 2**30


def record(**more: Any) -> dict[str, Any]:
    state = {"params": 2 * GIB, "router": 0, "optimizer": 4 * GIB}
    return {"memory": {"fits": True, "limit": 16.0 * GIB, "state": state}, "waste": None} | more


def misfit(state: float, limit: float | None = 16.0 * GIB, **more: Any) -> dict[str, Any]:
    parts = {"params": state / 3, "router": 0, "optimizer": state / 3 * 2}
    return record(memory={"fits": False, "limit": limit, "state": parts, **more})


def said(found: dict[str, Any], *overrides: str, **mesh: int) -> str:
    return "\n".join(advice(planned("router.k=2", *overrides, **mesh), found))


def test_nothing_to_say():
    assert advice(planned(), record()) == []


def test_a_state_that_is_too_large():
    text = said(misfit(20 * GIB, total=24.0 * GIB))
    assert "It does not fit: 24.00 GiB of 16.00 GiB, of which parameters" in text
    assert "take 20.00 GiB" in text
    assert "mesh.rules=folded or hybrid (now separate)" in text
    assert "optimizer.moment_dtype=bfloat16" in text
    assert "remat" not in text  # no activation is small enough
    folded = said(
        misfit(20 * GIB, total=24.0 * GIB), "mesh.rules=folded", "optimizer.moment_dtype=bfloat16"
    )
    assert "Use more devices along mesh.fsdp or mesh.expert." in folded


def test_activations_that_are_too_large():
    text = said(
        misfit(2 * GIB, total=24.0 * GIB), "data.batch_size=32", "data.sequence_length=1024"
    )
    assert "model.remat=full (now none)" in text
    assert "Each device holds 4 rows at once: raise optimizer.accumulation (now 1)" in text
    assert "4 x 1024^2 scores a row: set attention.query_block=512" in text
    assert "dispatch.buffer_factor=1.25" in text
    assert "mesh.rules" not in text
    least = said(
        misfit(2 * GIB, total=24.0 * GIB),
        *("model.remat=full", "data.batch_size=8", "dispatch.name=capacity"),
    )
    assert least.endswith("Use more devices, or a mesh.sequence or mesh.tensor above 1.")


@pytest.mark.parametrize("limit", [None, 16.0 * GIB])
def test_a_refusal_without_sizes(limit):
    text = said(misfit(2 * GIB, limit=limit, compiler="RESOURCE_EXHAUSTED: vmem"))
    assert "The compiler refuses it (its words are in memory.compiler)" in text
    assert "model.remat=full" in text


def test_flops():
    work = {"ratio": 1.02, "compiled": 10.0, "places": {"moe/x.py:7 dot (forward)": 4.0}}
    assert said(record(flops=work)) == ""
    text = said(record(flops=work | {"ratio": 8.5}))
    assert (
        "computes 8.50 times the least. Its largest product, moe/x.py:7 dot (forward), takes 40%"
        in text
    )


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (("dispatch.name=capacity",), "a smaller dispatch.capacity_factor"),
        (("dispatch.exchange=all_to_all",), "Set dispatch.buffer_factor=1.25"),
        (
            ("dispatch.exchange=all_to_all", "dispatch.buffer_factor=2.0"),
            "lower it if few are dropped",
        ),
        (("dispatch.exchange=all_gather",), "each device receives every token"),
    ],
)
def test_exchange(overrides, fix):
    sent = {"exchange_ratio": 2.5, "largest_weight_gather": 0.1}
    text = said(record(collectives=sent), *overrides, expert=8)
    assert "sends 2.50 times the least" in text
    assert fix in text
    assert said(record(collectives=sent | {"exchange_ratio": 1.09}), *overrides, expert=8) == ""
    assert said(record(collectives=sent | {"exchange_ratio": None}), *overrides, expert=8) == ""


def test_gathered_experts_drops_and_loops():
    text = said(record(collectives={"exchange_ratio": None, "largest_weight_gather": 1.0}))
    assert "as much to one device as all experts of a layer have" in text
    waste = {"what": "6 slots an expert", "drops": 0.05, "padding": 0.3}
    assert "5.0% of them are dropped (6 slots an expert)" in said(record(waste=waste))
    assert said(record(waste=waste | {"drops": 0.005})) == ""
    loops = said(record(unknown_loops=["moe/a.py:1", "moe/b.py:2"]))
    assert "count as one turn here (moe/a.py:1, moe/b.py:2)" in loops
