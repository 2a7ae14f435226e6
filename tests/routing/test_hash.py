import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from moe.errors import ConfigError
from moe.routing import hash
from tests.routing.cases import Case

V, E = 5000, 32
NO_LOGITS = np.zeros((2, 4, E), np.float32)
ZIPF = (1e7 / np.arange(1, V + 1)).astype(np.int64)


def table(kind, k=1, seed=0, counts=ZIPF):
    make = jax.jit(lambda key: hash.init_state(E, V, k, key, counts, kind=kind)["table"])
    return np.asarray(make(jax.random.key(seed)))


def shares(experts, counts=ZIPF):
    load = np.zeros(E)
    np.add.at(load, experts, counts[:, None])
    return load / load.sum()


@pytest.mark.parametrize("kind", hash.KINDS)
@pytest.mark.parametrize("k", [1, 3])
def test_tables_list_different_experts_and_differ_by_key_only(kind, k):
    experts = table(kind, k)
    assert experts.shape == (V, k)
    assert experts.dtype == np.int32
    assert (np.diff(np.sort(experts, axis=-1), axis=-1) > 0).all()
    np.testing.assert_array_equal(experts, table(kind, k))
    assert (experts != table(kind, k, seed=1)).mean() > 0.5


def test_random_table_is_uniform_over_ids():
    assert chisquare(np.bincount(table("random").ravel(), minlength=E)).pvalue > 1e-4


def test_balanced_table_is_as_even_as_its_most_frequent_id_allows():
    balanced, random = shares(table("balanced")).max(), shares(table("random")).max()
    top = ZIPF[0] / ZIPF.sum()
    assert balanced < random
    assert balanced <= 1 / E + top
    np.testing.assert_allclose(balanced, top, rtol=1e-3)  # 0.110, reached by that id alone
    np.testing.assert_allclose(shares(table("balanced", k=4)).max(), 1 / E, rtol=1e-3)


def test_ids_that_never_occur_are_spread_too():
    counts = np.where(np.arange(V) < 10, 1_000_000, 0)
    experts = table("balanced", counts=counts)
    unseen = np.bincount(experts[10:, 0], minlength=E)
    assert np.sort(unseen)[10:].max() - np.sort(unseen)[10:].min() <= 1


def test_counts_beyond_int32_are_packed_like_their_proportions():
    np.testing.assert_allclose(
        shares(table("balanced", k=4, counts=ZIPF * 10**6)).max(), 1 / E, rtol=1e-3
    )


def test_an_id_goes_to_its_experts_at_every_position():
    listed, ids = table("random", k=2), np.array([[3, 7, 3, 4999], [7, 3, 3, 0]])
    plan = Case("hash", 2).route(NO_LOGITS, state={"table": listed}, token_ids=ids).plan
    np.testing.assert_array_equal(plan.expert, listed[ids])
    np.testing.assert_array_equal(plan.gate, 0.5)


def test_probs_are_the_gates_spread_over_experts():
    routing = Case("hash", 2).route(NO_LOGITS, state={"table": table("random", k=2)})
    np.testing.assert_array_equal(
        np.take_along_axis(*map(np.asarray, (routing.probs, routing.plan.expert)), -1),
        routing.plan.gate,
    )


def test_ids_outside_the_table_use_its_nearest_end():
    listed, ids = table("random", k=2), np.array([[-5, V + 9, 0, V - 1]] * 2)
    plan = Case("hash", 2).route(NO_LOGITS, state={"table": listed}, token_ids=ids).plan
    np.testing.assert_array_equal(plan.expert[:, :2], plan.expert[:, 2:])


def test_missing_inputs_are_errors():
    logits, valid = jnp.zeros((1, 1, E)), jnp.ones((1, 1), bool)
    state, ids = {"table": jnp.zeros((V, 2), jnp.int32)}, jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="token_ids"):
        hash.route(logits, valid, k=2, state=state)
    with pytest.raises(ValueError, match="lists 2 experts an id, not 1"):
        hash.route(logits, valid, k=1, state=state, token_ids=ids)
    with pytest.raises(ValueError, match="token_counts of shape"):
        hash.init_state(E, V, 1, jax.random.key(0), kind="balanced")
    with pytest.raises(ConfigError, match="'clustered' is not one of random, balanced"):
        hash.check(E, k=1, kind="clustered")
