"""The least work and traffic of a step against counts by hand."""

import math

import pytest

from moe import setup
from moe.dryrun.ideal import (
    Part,
    causal_saving,
    exchange_traffic,
    ideal_parts,
    ideal_traffic,
    pair_flops,
    state_bytes,
)
from moe.model.build import model_size, model_spec
from moe.model.spec import Stem
from moe.training.state import abstract_state
from tests import tiny
from tests.dryrun.common import planned

# Of models.tiny(): layers, width, heads, heads of keys, width of a head, hidden widths, experts.
L, D, H, KV, X, MLP, F, E = 2, 32, 4, 2, 8, 64, 32, 8
V, T, S = 48, 48, 16
K = 2

ATTENTION = L * (D * H * X + 2 * D * KV * X + H * X * D)
SCORES = 2 * 2 * T * S * L * H * X
LOGITS = V * D


def spec(*overrides: str):
    return model_spec(tiny.config("data.sequence_length=16", *overrides), V)


def by_name(*overrides: str) -> dict[str, tuple[float, float]]:
    parts = ideal_parts(spec(*overrides), T, S)
    return {part.name: (part.forward, part.recompute) for part in parts}


def flops(numbers: int) -> float:
    return 2.0 * T * numbers


DENSE = ("model.pattern=('dense',)",)
SPARSE = ("model.pattern=('sparse',)", f"router.k={K}")


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_dense(remat):
    wi, wo = L * D * 2 * MLP, L * MLP * D
    again = {  # the last product of a block is added to the residual and not needed again
        "none": (0, 0, 0),
        "full": (flops(ATTENTION), flops(wi), SCORES),
        "dots": (0, 0, SCORES),
    }[remat]
    assert by_name(*DENSE, f"model.remat={remat}") == {
        "attention": (flops(ATTENTION), again[0]),
        "dense": (flops(wi + wo), again[1]),
        "attention scores": (SCORES, again[2]),
        "logits": (flops(LOGITS), 0),
    }


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_sparse(remat):
    experts, gate = flops(L * K * 3 * D * F), flops(L * D * E)
    again = {
        "none": (0, 0, 0, 0),
        "full": (
            flops(ATTENTION),
            experts,
            gate,
            SCORES,
        ),  # a gate's gradient reads what experts gave
        "dots": (0, experts, 0, SCORES),
    }[remat]
    assert by_name(*SPARSE, f"model.remat={remat}") == {
        "attention": (flops(ATTENTION), again[0]),
        "experts": (experts, again[1]),
        "gate": (gate, again[2]),
        "attention scores": (SCORES, again[3]),
        "logits": (flops(LOGITS), 0),
    }


def test_shared_experts_have_their_own_line():
    hidden = 2 * F
    found = by_name(*SPARSE, "model.shared_experts=2", "model.remat=full")
    assert found["shared"] == (flops(L * 3 * D * hidden), flops(L * 2 * D * hidden))


@pytest.mark.parametrize(
    "kind", [DENSE, SPARSE, ("model.pattern=('depth','dense')", "allow_noncausal=True")]
)
def test_forward_is_the_models_own_count_and_the_masked_pairs(kind):
    model = spec(*kind)
    forward = sum(part.forward for part in ideal_parts(model, T, S))
    masked = 2 * pair_flops(model, T, S) * (1 - (S + 1) / (2 * S))
    assert forward - masked == pytest.approx(T * model_size(model, S).flops_per_token)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_pairs_of_pictures_take_all_pairs_of_positions_and_a_stem(remat):
    more = (*DENSE, "data.sequence_length=16", "task.name=match", f"model.remat={remat}")
    model = model_spec(tiny.config(*more), V, stem=Stem("patches", frames=4, size=6))
    parts = {part.name: part for part in ideal_parts(model, T, S)}
    assert parts["stem"] == Part("stem", 2.0 * T * 6 * D * 4 / S, 0.0)
    assert parts["logits"] == Part("logits", 2.0 * T * D * D * 2 / S, 0.0)
    forward = sum(part.forward for part in parts.values())
    assert forward == pytest.approx(T * model_size(model, S).flops_per_token)
    assert causal_saving(model, T, S) == 0.0


def test_total_is_three_times_forward_and_the_recomputation():
    for remat, passes in (("none", 3), ("full", 4)):
        part = next(
            p
            for p in ideal_parts(spec(*SPARSE, f"model.remat={remat}"), T, S)
            if p.name == "experts"
        )
        assert part.total == passes * part.forward
        saved = causal_saving(spec(*SPARSE, f"model.remat={remat}"), T, S)
        assert saved == passes * SCORES * (S - 1) / (2 * S)


TOKENS, ROW = 256, D * 4


def exchange(local: int, n: int, passes: int = 4) -> float:
    return L * passes * local * K * ROW * (n - 1) / n


def test_exchange():
    assert exchange_traffic(planned(*SPARSE, fsdp=2, expert=4), TOKENS).bytes == exchange(32, 4)
    folded = planned(*SPARSE, "mesh.rules=folded", fsdp=2, expert=4)
    assert exchange_traffic(folded, TOKENS).bytes == exchange(32, 8)
    again = planned(*SPARSE, "model.remat=full", fsdp=2, expert=4)
    assert exchange_traffic(again, TOKENS).bytes == exchange(32, 4, passes=6)
    narrow = planned(*SPARSE, "model.dtype=bfloat16", expert=8)
    assert exchange_traffic(narrow, TOKENS).bytes == exchange(32, 8) / 2
    tensor = planned(*SPARSE, expert=4, tensor=2)  # both devices of `tensor` send all rows
    assert exchange_traffic(tensor, TOKENS).bytes == exchange(64, 4)
    assert exchange_traffic(planned(*SPARSE), TOKENS).bytes == 0


def size_of(run: setup.Run) -> tuple[int, int, int]:
    """Numbers of the experts, of matrices whose `D` is cut, and of what is whole (scales of norms)."""
    vocabulary = run.spec.vocab_size
    return L * E * 3 * D * F, ATTENTION + L * D * E + 2 * vocabulary * D, (2 * L + 1) * D


def test_parameters_separate():
    run = planned(*SPARSE, fsdp=2, expert=2)  # and data 2
    experts, others, whole = size_of(run)
    gathered, summed = (t.bytes for t in ideal_traffic(run, TOKENS)[1:])
    use = experts / 2 + others  # of what a device multiplies with; half of it is its own
    assert gathered == pytest.approx(4 * 2 * use / 2)
    # Experts: cut over fsdp, a sum over data. Others: a sum over data and expert. Norms: over all.
    sums = use / 2 + 2 * experts / 4 / 2 + 2 * others / 2 * 3 / 4 + 2 * whole * 7 / 8
    assert summed == pytest.approx(4 * sums)


def test_parameters_folded():
    run = planned(*SPARSE, "mesh.rules=folded", fsdp=2, expert=4)
    _, others, whole = size_of(run)
    gathered, summed = (t.bytes for t in ideal_traffic(run, TOKENS)[1:])
    assert gathered == pytest.approx(4 * 2 * others * 7 / 8)  # experts never move
    assert summed == pytest.approx(4 * (others * 7 / 8 + 2 * whole * 7 / 8))


def test_parameters_hybrid():
    run = planned(*SPARSE, "mesh.rules=hybrid", fsdp=2, expert=4)
    experts, others, whole = size_of(run)
    gathered, summed = (t.bytes for t in ideal_traffic(run, TOKENS)[1:])
    once = experts / 4 / 2 + others * 7 / 8
    assert gathered == pytest.approx(4 * 2 * once)
    assert summed == pytest.approx(4 * (once + 2 * whole * 7 / 8))


def test_state_bytes_are_those_of_a_device():
    run = planned(*SPARSE, "mesh.rules=folded", fsdp=2, expert=4)
    shapes = abstract_state(run.spec, run.transformation, run.shardings)
    found = state_bytes(run.shardings, shapes)
    experts, others, whole = size_of(run)
    params = 4 * (experts // 8 + others // 8 + whole)
    assert found["params"] == params
    counters = found["optimizer"] - 2 * params
    assert 0 < counters <= 16
    assert found["router"] == 0
    assert math.isclose(model_size(run.spec, S).parameters_total, experts + others + whole)
