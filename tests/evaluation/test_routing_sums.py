"""Sums made inside jit equal their NumPy twins on the same choices, whatever the batches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from moe.dispatch.reference import reference
from moe.evaluation import routing_analysis as analysis
from moe.evaluation import routing_paths, routing_sums
from moe.evaluation.evaluate import evaluate, make_eval_step
from moe.parallel.mesh import make_mesh
from moe.parallel.rules import BATCH_SPEC
from tests import tiny

OPTIONS = ("model.num_experts=4",)
DOMAINS = ("code", "prose")
E = 4
ROWS = tiny.batch(((16,), (7, 6), (11,), (2, 2, 2), (16,), (9, 7)))


class Whole:
    """One evaluation with the vocabulary, in batches of two rows, and the choices behind it."""

    def __init__(self):
        model = tiny.model(*OPTIONS)
        step = make_eval_step(
            model.skeleton, reference, jnp.ones(tiny.VOCAB, jnp.int32), 2, vocabulary=True
        )
        parts = [jax.tree.map(lambda a, i=i: a[i : i + 2], ROWS) for i in (0, 2, 4)]
        self.step, self.parts, self.model = jax.jit(step), parts, model
        self.found = evaluate(
            self.step,
            model.params,
            model.router,
            parts,
            jax.random.key(0),
            domains=DOMAINS,
            to_device=lambda batch: batch,
        )
        out = model(ROWS)
        self.expert = np.asarray(out.reports.expert)
        self.predicted = np.asarray(out.logits.argmax(axis=-1))

    def per_layer(self, name: str) -> Any:
        return self.found.metrics[f"routing/per_layer/{name}"]


@pytest.fixture(scope="module")
def whole() -> Whole:
    return Whole()


def counts_by(whole: Whole, kind: np.ndarray, kinds: int) -> np.ndarray:
    return analysis.visit_counts(whole.expert, kind, kinds, E)


def test_coactivation(whole):
    counts = analysis.coactivation_counts(whole.expert, E)
    table = whole.found.tables["routing/coactivation"]
    np.testing.assert_allclose(table, analysis.coactivation(counts), atol=1e-4)
    np.testing.assert_allclose(
        whole.per_layer("coactivation"), analysis.strongest_partner(counts), rtol=1e-6
    )


def test_positions(whole):
    bins = routing_sums.POSITION_BINS
    where = analysis.position_bins(np.asarray(ROWS.positions), bins)
    counts = counts_by(whole, where, bins)
    tokens = np.bincount(where[np.asarray(ROWS.valid)], minlength=bins)
    expected = analysis.specialisation(counts, tokens)
    np.testing.assert_allclose(whole.found.tables["routing/positions"], expected, atol=1e-4)
    np.testing.assert_allclose(expected.sum(axis=-1), 2.0)  # top-2
    np.testing.assert_allclose(
        whole.per_layer("position_information"), analysis.mutual_information(counts), atol=1e-6
    )


def test_domains(whole):
    domain = np.broadcast_to(np.asarray(ROWS.domain)[:, None], ROWS.tokens.shape)
    counts = counts_by(whole, domain, 2)
    tokens = np.bincount(domain[np.asarray(ROWS.valid)])
    np.testing.assert_allclose(
        whole.found.tables["routing/domains"], analysis.specialisation(counts, tokens), atol=1e-4
    )
    np.testing.assert_allclose(
        whole.per_layer("domain_information"), analysis.mutual_information(counts), atol=1e-6
    )
    np.testing.assert_allclose(
        whole.per_layer("domain_divergence"), analysis.mean_divergence(counts), atol=1e-6
    )


def test_vocabulary_of_inputs_and_predictions(whole):
    sums = [whole.step(whole.model.params, {}, part, jax.random.key(0))[0] for part in whole.parts]
    host = [routing_sums.collect(s.routing) for s in sums]
    added = functools.reduce(routing_sums.add, host)
    for name, ids in (("inputs", np.asarray(ROWS.tokens)), ("predictions", whole.predicted)):
        found = getattr(added, name)
        counts = counts_by(whole, ids, tiny.VOCAB)
        tokens = np.bincount(ids[np.asarray(ROWS.valid)], minlength=tiny.VOCAB)
        np.testing.assert_array_equal(found.choices, counts)
        np.testing.assert_array_equal(found.tokens, tokens)
        expected = analysis.vocabulary_specialisation(counts, tokens)
        np.testing.assert_allclose(whole.per_layer(f"vocabulary_{name}"), expected)
    assert (expected > 0).all(), "no id is frequent enough: the case tests nothing"


def test_paths(whole):
    paths = routing_paths.path_counts(whole.expert, np.asarray(ROWS.valid), E)
    expected = routing_paths.path_metrics(paths)
    for name, value in expected.items():
        assert whole.found.metrics[f"routing/{name}"] == pytest.approx(value)
    assert 1 < len(paths.path) < paths.tokens.sum()


def test_vocabulary_is_counted_only_when_asked_for():
    model = tiny.model(*OPTIONS)
    step = make_eval_step(model.skeleton, reference, jnp.ones(tiny.VOCAB, jnp.int32), 2)
    sums, _ = jax.eval_shape(step, model.params, model.router, ROWS, jax.random.key(0))
    assert sums.routing.inputs is None
    assert max(np.prod(leaf.shape) for leaf in jax.tree.leaves(sums)) < 2 * E * tiny.VOCAB


def test_dropped_and_missing_choices_visit_nobody():
    expert = jnp.asarray([[[[1, -1], [-1, -1], [2, 0]]]])
    hot = np.asarray(routing_sums.visits(expert, 3))
    np.testing.assert_array_equal(hot, analysis.multi_hot(np.asarray(expert), 3))
    assert hot.sum() == 3


def test_sharded_sums_equal_those_of_one_device(whole):
    mesh = make_mesh(data=2, fsdp=1, expert=1, tensor=4)
    model = whole.model
    step = make_eval_step(
        model.skeleton, reference, jnp.ones(tiny.VOCAB, jnp.int32), 2, vocabulary=True
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, BATCH_SPEC)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            step,
            in_shardings=(everywhere, everywhere, rows, everywhere),
            out_shardings=everywhere,
        )
        sums, _ = jitted(model.params, model.router, whole.parts[0], jax.random.key(0))
    alone, _ = whole.step(model.params, model.router, whole.parts[0], jax.random.key(0))
    one, two = (routing_sums.collect(s.routing) for s in (sums, alone))
    jax.tree.map(np.testing.assert_array_equal, one, two)
