import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from moe.errors import ConfigError
from moe.routing import bigram_hash
from moe.routing.bigram_hash import ROUTER

B, S, E, K, BUCKETS = 2, 12, 8, 2, 4096
IDS = np.random.default_rng(0).integers(0, 50, (B, S)).astype(np.int32)
ONE_DOCUMENT = np.ones((B, S), np.int32)
TABLE = np.asarray(bigram_hash.init_state(E, 50, K, jax.random.key(0), buckets=BUCKETS)["table"])


@functools.cache
def compiled(k):
    return jax.jit(functools.partial(bigram_hash.route, k=k))


def route(ids, documents=None, table=TABLE):
    documents = np.ones(ids.shape, np.int32) if documents is None else documents
    logits = np.zeros((*ids.shape, E), np.float32)
    run = compiled(table.shape[1])
    found = run(logits, documents > 0, token_ids=ids, documents=documents, state={"table": table})
    return jax.device_get(found)


def experts(*arguments, **options):
    return route(*arguments, **options).plan.expert


def test_tables_list_different_experts_and_differ_by_key_only():
    make = functools.partial(bigram_hash.init_state, E, 50, K, buckets=BUCKETS)
    other = np.asarray(make(jax.random.key(1))["table"])
    assert TABLE.shape == (BUCKETS, K)
    assert TABLE.dtype == np.int32
    assert (TABLE[:, 0] != TABLE[:, 1]).all()
    np.testing.assert_array_equal(TABLE, make(jax.random.key(0))["table"])
    assert (other != TABLE).mean() > 0.5


def test_a_bigram_goes_to_its_experts_at_every_position_and_row():
    ids = IDS.copy()
    ids[0, 3:5] = ids[0, 8:10] = ids[1, 6:8] = [7, 9]
    expert = experts(ids)
    np.testing.assert_array_equal(expert[0, 4], expert[0, 9])
    np.testing.assert_array_equal(expert[0, 4], expert[1, 7])
    routing = route(ids)
    assert not routing.logits.any()
    np.testing.assert_array_equal(routing.plan.gate, 1 / K)
    np.testing.assert_array_equal(
        np.take_along_axis(routing.probs, routing.plan.expert, -1), routing.plan.gate
    )


def test_the_first_token_of_a_document_does_not_see_the_document_before():
    documents = np.where(np.arange(S) < 5, 1, 2).astype(np.int32) * ONE_DOCUMENT
    packed, alone = experts(IDS, documents), experts(np.roll(IDS, -5, axis=1))
    np.testing.assert_array_equal(packed[:, 5:], alone[:, : S - 5])
    assert (experts(IDS)[:, 5] != packed[:, 5]).any()


def test_only_a_token_and_the_one_before_it_count():
    assert ROUTER.causality == "C1"
    before = experts(IDS)
    for t in range(S):
        changed = IDS.copy()
        changed[:, t] = 49 - changed[:, t]
        same = (experts(changed) == before).all(axis=(0, 2))
        assert same[:t].all()
        assert same[t + 2 :].all()


def test_padding_is_not_chosen_for():
    documents = np.where(np.arange(S) < np.array([[S], [4]]), 1, 0).astype(np.int32)
    plan = route(IDS, documents).plan
    np.testing.assert_array_equal(plan.valid, np.repeat(documents[..., None] > 0, K, axis=-1))
    assert not plan.gate[1, 4:].any()


def test_buckets_are_filled_evenly():
    first, second = np.divmod(np.arange(20000, dtype=np.int32)[None], 200)
    bucket = np.asarray(bigram_hash.bucket_of(jnp.asarray(first), jnp.asarray(second), 64))
    assert bucket.min() >= 0
    assert chisquare(np.bincount(bucket[0], minlength=64)).pvalue > 1e-4
    swapped = np.asarray(bigram_hash.bucket_of(jnp.asarray(second), jnp.asarray(first), 64))
    assert (bucket == swapped).mean() < 0.05  # the order of the two ids matters


def test_a_frequent_id_is_split_among_experts():
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 2001)
    ids = rng.choice(2000, (1, 20000), p=share / share.sum()).astype(np.int32)
    table = np.random.default_rng(1).integers(0, E, (BUCKETS, 1)).astype(np.int32)
    load = np.bincount(experts(ids, table=table).ravel(), minlength=E) / ids.size
    alone = np.bincount(table[ids[0], 0], minlength=E) / ids.size  # the same table by single ids
    assert load.max() < alone.max()
    of_top = experts(ids, table=table)[ids == 0]
    assert len(np.unique(of_top)) == E


def test_impossible_tables_are_refused():
    with pytest.raises(ConfigError, match=r"buckets=4 must be at least model\.num_experts=8"):
        bigram_hash.check(8, k=1, buckets=4)
    ids, documents = jnp.asarray(IDS), jnp.asarray(ONE_DOCUMENT)
    with pytest.raises(ValueError, match="needs its table"):
        bigram_hash.route(
            jnp.zeros((B, S, E)), documents > 0, k=K, token_ids=ids, documents=documents
        )
