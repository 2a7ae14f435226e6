"""Two forward passes over the same text: two checkpoints, or the two forms of one router.

Against a later checkpoint this gives router saturation and against an earlier one churn (M11);
against the form of training it gives the causal gap (M17), which every language model must report
whose router reads the future in training. What else is in the batch is no part of it: the routers'
contract keeps rows apart in either form.
"""

from collections.abc import Callable, Iterable
import itertools
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key, Shaped
import numpy as np

from moe.data.types import Batch
from moe.dispatch.types import Dispatch
from moe.evaluation import routing_analysis as analysis
from moe.evaluation.routing_analysis import Overlap
from moe.evaluation.routing_sums import visits
from moe.model.layer import Call
from moe.training.objective import Forward, forward
from moe.training.state import Skeleton


class Comparison(NamedTuple):
    """Sums over the valid tokens."""

    overlap: tuple[Shaped[Any, " L"], ...]  # the fields of `Overlap`
    nll: Float[Any, ""]  # of the first pass, nats
    reference_nll: Float[Any, ""]  # of the second
    predictions: Float[Any, ""]  # what they are sums over


class Numbers(NamedTuple):
    """A checkpoint's pure dicts."""

    params: Any
    router: Any


ComparisonStep = Callable[[Numbers, Numbers, Batch, Key[Array, ""]], Comparison]


def make_comparison_step(
    skeleton: Skeleton,
    dispatch: Dispatch,
    token_bytes: Int[Array, " V"],
    *,
    training_form: bool = False,
) -> ComparisonStep:
    """Builds `(numbers, numbers of the reference, batch, key) -> sums`; jit it.

    Args:
        skeleton: of both models; sparse.
        dispatch: how tokens reach experts, in both.
        token_bytes: bytes that each id stands for.
        training_form: whether the reference routes as in training, with its key and without
            dropout; hand the same numbers in twice for the causal gap.
    """

    def step(numbers: Numbers, reference: Numbers, batch: Batch, key: Key[Array, ""]) -> Comparison:
        call = Call(batch.tokens, batch.valid, dispatch, key=key)
        other = call._replace(training=training_form)
        one = forward(skeleton, *numbers, batch, call, token_bytes)
        two = forward(skeleton, *reference, batch, other, token_bytes)
        return comparison(one, two)

    return step


def comparison(one: Forward, two: Forward) -> Comparison:
    """Compares two passes of sparse models over one batch."""
    assert one.reports is not None
    assert two.reports is not None
    E = one.reports.row_requested.shape[-1]
    overlap = overlap_sums(one.reports.expert, two.reports.expert, E)
    return Comparison(overlap, one.rows.nll.sum(), two.rows.nll.sum(), one.rows.tokens.sum())


def overlap_sums(
    expert: Int[Array, "L B S K"], reference: Int[Array, "L B S J"], num_experts: int
) -> tuple[Int[Array, " L"], ...]:
    """The twin of `routing_analysis.overlap_counts` inside jit."""
    one, two = visits(expert, num_experts), visits(reference, num_experts)
    return (
        (one & two).sum(axis=(1, 2, 3)),
        two.sum(axis=(1, 2, 3)),
        (one != two).any(axis=-1).sum(axis=(1, 2)),
        (one | two).any(axis=-1).sum(axis=(1, 2)),
    )


def compare(
    step: ComparisonStep,
    numbers: Numbers,
    reference: Numbers,
    batches: Iterable[Batch],
    key: Key[Array, ""],
    *,
    to_device: Callable[[Batch], Batch],
    limit: int | None = None,
) -> Comparison:
    """Runs over the batches as `evaluate` does, the key of each included; sums on the host.

    Args:
        step: jitted `make_comparison_step(...)`.
        numbers: whose choices are judged.
        reference: against whom.
        batches: this process's part of each global batch.
        key: that of the evaluation, so that both see the same draws.
        to_device: makes the global batch of this process's part.
        limit: batches at most; None is the whole split.
    """
    sums = None
    for index, local in enumerate(itertools.islice(batches, limit)):
        done = step(numbers, reference, to_device(local), jax.random.fold_in(key, index))
        done = jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(done))
        sums = done if sums is None else jax.tree.map(np.add, sums, done)
    assert sums is not None
    return sums


def saturation_metrics(sums: Comparison) -> dict[str, Any]:
    """`overlap_metrics` of the first pass against the reference."""
    return overlap_metrics(Overlap(*sums.overlap))


def overlap_metrics(sums: Overlap) -> dict[str, Any]:
    """`routing/saturation` of choices against a reference, and `routing/churn`, one less it."""
    share = analysis.saturation(sums)
    return _named({"saturation": share, "churn": 1.0 - share})


def causal_metrics(sums: Comparison) -> dict[str, Any]:
    """`routing/causal_gap` in nats a token, and `routing/causal_flip_rate` of the choices.

    The first pass must have routed causally and the second as in training.
    """
    gap = analysis.causal_gap(float(sums.nll), float(sums.reference_nll), float(sums.predictions))
    flips = _named({"causal_flip_rate": analysis.flip_rate(Overlap(*sums.overlap))})
    return {"routing/causal_gap": gap, **flips}


def _named(layers: dict[str, np.ndarray]) -> dict[str, Any]:
    means = {f"routing/{name}": float(value.mean()) for name, value in layers.items()}
    return means | {f"routing/per_layer/{name}": value.tolist() for name, value in layers.items()}
