"""Evaluation is a sum over the split: exact, whatever the batch size, by domain and in all."""

from collections.abc import Callable, Iterator
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.data.types import Batch
from moe.dispatch.capacity import capacity
from moe.dispatch.reference import reference
from moe.evaluation.evaluate import (
    Evaluation,
    EvaluationStopped,
    evaluate,
    make_eval_step,
    quality,
)
from moe.training.objective import RowSums
from tests import tiny

DEEPSEEK = ("router.name=deepseek_v3", "model.num_layers=1", "model.num_experts=4")
DOMAINS = ("code", "prose", "empty")
ROWS = tiny.batch(((16,), (7, 6), (11,), (2, 2, 2), (16,), (1,), (9, 7)))
TOKEN_BYTES = np.arange(tiny.VOCAB) % 4  # some tokens stand for no byte


@functools.cache
def eval_step(dispatch: Any = reference):
    model = tiny.model(*DEEPSEEK)
    return jax.jit(make_eval_step(model.skeleton, dispatch, jnp.asarray(TOKEN_BYTES), len(DOMAINS)))


def batches(size: int) -> Iterator[Batch]:
    """The rows in batches, the last one filled with padding, as the data gives them."""
    host = jax.tree.map(np.asarray, ROWS)
    for start in range(0, len(host.tokens), size):
        part = jax.tree.map(lambda a, start=start: a[start : start + size], host)
        missing = size - len(part.tokens)
        yield jax.tree.map(lambda a, n=missing: np.pad(a, [(0, n), (0, 0)][: a.ndim]), part)


def measure(
    size: int,
    *,
    limit: int | None = None,
    step: Any = None,
    stop: Callable[[], bool] | None = None,
) -> Evaluation:
    model = tiny.model(*DEEPSEEK)
    return evaluate(
        step or eval_step(),
        model.params,
        model.router,
        batches(size),
        jax.random.key(0),
        domains=DOMAINS,
        to_device=lambda batch: jax.tree.map(jnp.asarray, batch),
        limit=limit,
        stop=stop,
    )


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return measure(len(ROWS.tokens))


@pytest.mark.parametrize("size", [3, 4])
def test_independent_of_the_batch_size(size, whole):
    found = measure(size)
    assert found.metrics.keys() == whole.metrics.keys()
    for key, value in whole.metrics.items():
        if not key.endswith(("_shuffled", "_excess")):  # kinds are permuted within a batch
            np.testing.assert_allclose(found.metrics[key], value, rtol=1e-5, err_msg=key)
    for name, values in whole.domains.items():
        assert found.domains[name] == pytest.approx(values, rel=1e-5)
        np.testing.assert_allclose(found.domain_load[name], whole.domain_load[name], rtol=1e-6)


def test_equals_a_loop_over_tokens(whole):
    logits = tiny.model(*DEEPSEEK)(ROWS).logits
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, ROWS.targets)
    nats = correct = tokens = sizes = 0
    for b, s in zip(*np.nonzero(ROWS.valid), strict=True):
        target = int(ROWS.targets[b, s])
        nats += float(nll[b, s])
        correct += int(logits[b, s].argmax()) == target
        tokens += 1
        sizes += int(TOKEN_BYTES[target])
    assert whole.metrics["tokens"] == tokens
    assert whole.metrics["loss/cross_entropy"] == pytest.approx(nats / tokens, rel=1e-5)
    assert whole.metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert whole.metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / sizes, rel=1e-5)
    assert whole.metrics["accuracy"] == pytest.approx(correct / tokens)


def test_a_stop_is_asked_for_between_two_batches_and_ends_the_evaluation():
    answers = iter([False, False, True])
    with pytest.raises(EvaluationStopped, match="after 3 batches"):
        measure(2, stop=lambda: next(answers))
    assert not list(answers)
    asked = []
    measure(4, stop=lambda: bool(asked.append(1)))
    assert len(asked) == -(-len(ROWS.tokens) // 4) - 1  # what is found already is not thrown away


def test_domains_add_up_to_the_total(whole):
    assert set(whole.domains) == {"code", "prose"}, "a domain without a token is left out"
    parts = [whole.domains[name] for name in ("code", "prose")]
    assert sum(part["tokens"] for part in parts) == whole.metrics["tokens"]
    for key in ("loss/cross_entropy", "accuracy"):
        total = sum(part[key] * part["tokens"] for part in parts) / whole.metrics["tokens"]
        assert total == pytest.approx(whole.metrics[key], rel=1e-6)
    loads = np.array([whole.domain_load[name] for name in ("code", "prose")])  # [M L E]
    np.testing.assert_allclose(loads.sum(axis=-1), 1.0)
    share = np.array([part["tokens"] for part in parts]) / whole.metrics["tokens"]
    np.testing.assert_allclose(np.einsum("m,mle->le", share, loads), whole.metrics["routing/load"])


def test_sample_is_the_first_row(whole):
    sample = whole.sample
    np.testing.assert_array_equal(sample.tokens, ROWS.tokens[0])
    assert sample.domain == 0
    expert = tiny.model(*DEEPSEEK)(ROWS).reports.expert
    np.testing.assert_array_equal(sample.experts, expert[:, 0])


def test_limit_is_a_number_of_batches():
    assert measure(4, limit=1).metrics["tokens"] == ROWS.valid[:4].sum()


def test_drops_only_where_capacity_was_asked_for(whole):
    assert whole.metrics["routing/drop_rate"] == 0.0
    tight = jax.jit(
        make_eval_step(
            tiny.model(*DEEPSEEK).skeleton,
            functools.partial(capacity, capacity_factor=0.5),
            jnp.asarray(TOKEN_BYTES),
            len(DOMAINS),
        )
    )
    assert measure(len(ROWS.tokens), step=tight).metrics["routing/drop_rate"] > 0.05


def test_router_state_is_read_and_not_moved(whole):
    """The bias decides, and stays; noise of training is off, so the key changes the control alone."""
    model = tiny.model(*DEEPSEEK)
    before = jax.tree.map(np.array, model.router)
    step, batch = eval_step(), next(batches(len(ROWS.tokens)))
    sums = step(model.params, model.router, batch, jax.random.key(0)).sums
    again = step(model.params, model.router, batch, jax.random.key(1)).sums
    without_control = [found._replace(routing=None) for found in (again, sums)]
    jax.tree.map(np.testing.assert_array_equal, *without_control)
    jax.tree.map(np.testing.assert_array_equal, before, model.router)
    lifted = jax.tree.map(lambda bias: bias.at[:, 0].add(10.0), model.router)
    biased = step(model.params, lifted, batch, jax.random.key(0)).sums
    assert int(biased.totals.requested[0, 0]) == int(biased.totals.tokens[0])
    assert int(sums.totals.requested[0, 0]) < int(sums.totals.tokens[0])


def test_quality_of_nothing_is_finite():
    values = quality(RowSums(*(np.float64(0.0),) * 4))
    assert all(math.isfinite(value) for value in values.values())
    assert values["tokens"] == 0.0


def test_several_passes_average_what_random_routers_predict():
    model, batch = tiny.model("router.name=random", "model.num_layers=1"), tiny.batch()
    tokens = jnp.asarray(TOKEN_BYTES)

    def nll(passes: int) -> float:
        step = make_eval_step(model.skeleton, reference, tokens, len(DOMAINS), passes=passes)
        found = jax.jit(step)(model.params, model.router, batch, jax.random.key(0))
        return float(found.sums.rows.nll.sum())

    one, many = nll(1), nll(6)
    assert many < one, "an ensemble of draws predicts better than one of them"
