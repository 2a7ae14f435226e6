"""Sums made inside jit equal their NumPy twins on the same choices, whatever the batches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from moe.data.types import Batch
from moe.dispatch.reference import reference
from moe.evaluation import routing_analysis as analysis
from moe.evaluation import routing_paths, routing_sums
from moe.evaluation.evaluate import evaluate, make_eval_step
from moe.parallel.mesh import make_mesh
from moe.parallel.rules import BATCH_SPEC
from moe.routing.types import LayerReport
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


def collected(whole: Whole) -> list[routing_sums.RoutingSums]:
    done = [
        whole.step(whole.model.params, {}, part, jax.random.fold_in(jax.random.key(0), i))
        for i, part in enumerate(whole.parts)
    ]
    return [routing_sums.collect(one[0].routing) for one in done]


def test_shuffled_domains(whole):
    """Rows of each batch swap their domains, by its own key."""
    found = functools.reduce(routing_sums.add, collected(whole)).domain_shuffled
    domain = np.asarray(ROWS.domain).copy()
    for i in range(3):
        draws = of_rows(jax.random.fold_in(jax.random.key(0), i))
        rows = slice(2 * i, 2 * i + 2)
        domain[rows] = analysis.shuffled(domain[rows], np.ones(2, bool), draws)
    kind = np.broadcast_to(domain[:, None], ROWS.tokens.shape)
    expected = counts_by(whole, kind, 2)
    np.testing.assert_array_equal(found, expected)
    assert (domain != np.asarray(ROWS.domain)).any(), "nothing moved: the case tests nothing"
    np.testing.assert_allclose(
        whole.per_layer("domain_information_shuffled"),
        analysis.mutual_information(expected),
        atol=1e-6,
    )
    excess = np.subtract(
        whole.per_layer("domain_information"), whole.per_layer("domain_information_shuffled")
    )
    np.testing.assert_allclose(whole.per_layer("domain_information_excess"), excess)


def of_rows(key: jax.Array) -> np.ndarray:
    key = jax.random.split(jax.random.fold_in(key, routing_sums.SHUFFLE))[0]
    return np.asarray(jax.random.uniform(key, (2,)))


def test_shuffle_is_its_twin():
    mask = np.random.default_rng(3).random(50) < 0.7
    key, kind = jax.random.key(3), np.arange(50)
    order = np.asarray(jax.jit(routing_sums.shuffle)(key, mask))
    draws = np.asarray(jax.random.uniform(key, (50,)))
    np.testing.assert_array_equal(kind[order], analysis.shuffled(kind, mask, draws))
    assert (order[mask] != np.flatnonzero(mask)).any()
    np.testing.assert_array_equal(order[~mask], np.flatnonzero(~mask))


def planted(expert: np.ndarray, modality: np.ndarray) -> tuple[Any, Any]:
    """The report of a router of top 1, `[L B S]`, and the batch with these modalities."""
    rows, length = modality.shape
    zeros = jnp.zeros((rows, length), jnp.int32)
    valid = jnp.asarray(np.arange(length) < length - 3 * np.arange(rows)[:, None])
    batch = Batch(
        zeros,
        zeros,
        zeros,
        zeros,
        valid,
        jnp.zeros(rows, jnp.int32),
        modality=jnp.asarray(modality),
    )
    chosen = jnp.where(valid, jnp.asarray(expert), -1)[..., None]
    requested = routing_sums.visits(chosen, E).sum(axis=2).astype(jnp.float32)
    fields = dict.fromkeys(LayerReport._fields, jnp.zeros(()))
    return LayerReport(**fields | {"expert": chosen, "row_requested": requested}), batch


def summary_of(report: LayerReport, batch: Batch) -> tuple[dict, dict, routing_sums.RoutingSums]:
    member = jnp.ones((batch.tokens.shape[0], 1))
    sums = jax.jit(routing_sums.routing_sums)(report, batch, member, jax.random.key(1))
    host = routing_sums.collect(sums)
    return *routing_sums.summarize(
        host, np.asarray(report.row_requested.sum(axis=1))[:, None]
    ), host


def test_modality_of_a_router_that_is_the_modality_and_of_one_that_knows_nothing():
    rng = np.random.default_rng(4)
    modality = rng.integers(0, 2, (6, 200)).astype(np.int32)
    expert = np.stack([modality, rng.integers(0, E, modality.shape)]).astype(np.int32)  # [L B S]
    report, batch = planted(expert, modality)
    values, tables, host = summary_of(report, batch)
    valid = np.asarray(batch.valid)
    share = np.bincount(modality[valid]) / valid.sum()
    told = values["routing/per_layer/modality_information"]
    np.testing.assert_allclose(told[0], -(share * np.log(share)).sum(), rtol=1e-6)
    assert told[0] == pytest.approx(np.log(2), abs=0.01)
    shares = values["routing/per_layer/modality_information_share"]
    np.testing.assert_allclose(shares[0], 1.0)
    control = values["routing/per_layer/modality_information_shuffled"]
    bias = (2 - 1) * (E - 1) / (2 * valid.sum())
    assert max(told[1], *control) < 6 * bias
    assert abs(values["routing/per_layer/modality_information_excess"][1]) < 6 * bias
    assert values["routing/per_layer/modality_information_excess"][0] > 0.65

    of_tokens = jax.random.split(jax.random.fold_in(jax.random.key(1), routing_sums.SHUFFLE))[1]
    draws = np.asarray(jax.random.uniform(of_tokens, (modality.size,)))
    mixed = analysis.shuffled(modality.ravel(), valid.ravel(), draws).reshape(modality.shape)
    choices = np.asarray(report.expert)
    for kind, found in ((modality, host.modalities.choices), (mixed, host.modalities.shuffled)):
        np.testing.assert_array_equal(found, analysis.visit_counts(choices, kind, 2, E))
    np.testing.assert_array_equal(tables["routing/modalities"][0][0], [1, 0, 0, 0])
    np.testing.assert_array_equal(host.modalities.tokens, np.bincount(modality[valid]))


def test_one_modality_tells_nothing():
    text = np.zeros((2, 8), np.int32)
    report, batch = planted(np.zeros((1, 2, 8), np.int32), text)
    values, tables, _ = summary_of(report, batch)
    assert "routing/modality_information" not in values
    assert "routing/modalities" not in tables
    values, tables, host = summary_of(report, batch._replace(modality=None))
    assert host.modalities is None
    assert values["routing/domain_information"] == 0.0


def test_favourites():
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 7, (2, 200)).astype(np.int32)
    expert = np.stack([np.where(ids < E, ids, rng.integers(0, E, ids.shape)), ids % 3])
    report, batch = planted(expert.astype(np.int32), np.zeros((2, 200), np.int32))
    batch = batch._replace(tokens=jnp.asarray(ids), modality=None)
    member = jnp.ones((2, 1))
    sums = routing_sums.routing_sums(report, batch, member, jax.random.key(1), vocab_size=9)
    assert sums.predictions is None
    table = routing_sums.summarize(routing_sums.collect(sums), np.ones((2, 1, E)))[1]
    counts = analysis.visit_counts(np.asarray(report.expert), ids, 9, E)
    expected = analysis.favourites(counts)
    for layer, e in np.ndindex(2, E):
        listed = expected.ids[layer, e] >= 0
        rows = table["routing/favourites"][layer][e]
        assert [row[0] for row in rows] == expected.ids[layer, e][listed].tolist()
        assert [row[1] for row in rows] == expected.counts[layer, e][listed].tolist()
        np.testing.assert_allclose([r[2] for r in rows], expected.lift[layer, e][listed], atol=1e-3)
    layer = table["routing/favourites"]
    assert [rows[0][0] for rows in layer[0]] == [0, 1, 2, 3]
    assert [{row[0] for row in rows} for rows in layer[1]] == [{0, 3, 6}, {1, 4}, {2, 5}, set()]


def test_ids_where_frames_stand_are_not_counted():
    modality = np.tile(np.array([0, 1], np.int32), (2, 10))
    report, batch = planted(np.zeros((1, 2, 20), np.int32), modality)
    member = jnp.ones((2, 1))
    logits = jnp.zeros((2, 20, 5)).at[..., 2].set(1.0)
    sums = routing_sums.routing_sums(report, batch, member, jax.random.key(0), logits, 5)
    text = int((np.asarray(batch.valid) & (modality == 0)).sum())
    assert text < int(batch.valid.sum())
    np.testing.assert_array_equal(sums.inputs.tokens, [text, 0, 0, 0, 0])
    np.testing.assert_array_equal(sums.predictions.choices[0, :, 0], [0, 0, text, 0, 0])


def test_rows_of_frames_alone_have_no_ids():
    report, batch = planted(np.zeros((1, 2, 8), np.int32), np.ones((2, 8), np.int32))
    sums = routing_sums.routing_sums(
        report, batch, jnp.ones((2, 1)), jax.random.key(0), vocab_size=5
    )
    values, tables = routing_sums.summarize(routing_sums.collect(sums), np.ones((1, 1, E)))
    assert "routing/vocabulary_inputs" not in values
    assert tables["routing/favourites"] == [[[]] * E]


def test_paths(whole):
    paths = routing_paths.path_counts(whole.expert, np.asarray(ROWS.valid), E)
    expected = routing_paths.path_metrics(paths)
    for name, value in expected.items():
        assert whole.found.metrics[f"routing/{name}"] == pytest.approx(value)
    assert 1 < len(paths.path) < paths.tokens.sum()


def test_vocabulary_is_counted_only_when_asked_for():
    model = tiny.model(*OPTIONS)
    step = make_eval_step(model.skeleton, reference, jnp.ones(tiny.VOCAB, jnp.int32), 2)
    sums = jax.eval_shape(step, model.params, model.router, ROWS, jax.random.key(0))[0]
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
        sums = jitted(model.params, model.router, whole.parts[0], jax.random.key(0))[0]
    alone = whole.step(model.params, model.router, whole.parts[0], jax.random.key(0))[0]
    one, two = (routing_sums.collect(s.routing) for s in (sums, alone))
    jax.tree.map(np.testing.assert_array_equal, one, two)
