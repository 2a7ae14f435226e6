"""Block attention against plain loops, its limits, and what it may never see."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.model.attention import Attention, KeyValues
from moe.model.block_attention import BlockAttention, block_mask
from moe.model.spans import places
from tests.model import variants
from tests.model.variants import H, Q, X

PACKED = ([13], [5, 7], [2, 1, 6])  # 13 positions a row, padding at the end of two


def plain_mask(q, k, positions, documents, block: int, chosen: int) -> np.ndarray:
    """[B H S S], query by query; keys as in `plain_heads`."""
    mask = np.zeros((q.shape[0], H, q.shape[1], q.shape[1]), bool)
    for b, h, t in np.ndindex(q.shape[0], H, q.shape[1]):
        blocks: dict[int, list[int]] = {}
        for s in range(t + 1):
            if documents[b, s] == documents[b, t]:
                blocks.setdefault(int(positions[b, s]) // block, []).append(s)
        own = int(positions[b, t]) // block
        past = [j for j in blocks if j != own]
        past.sort(key=lambda j: -(q[b, t, h] @ k[b, blocks[j], h].mean(axis=0)))
        for j in [own, *past[: chosen - 1]]:
            mask[b, h, t, blocks[j]] = True
    return mask


@partial(jax.jit, static_argnums=0)
def mask_of(module, x, positions, documents):
    turned = module.full.rotated(module.full.heads(x), positions)
    here, _ = places(positions, documents)
    return block_mask(turned.query, turned.key, here, here, block=module.block, top_k=module.top_k)


@pytest.fixture(scope="module")
def packed():
    return variants.inputs(*PACKED)


@pytest.mark.parametrize(("block", "top_k"), [(2, 2), (3, 3), (1, 3), (4, 1), (20, 2)])
def test_equals_plain_loops(packed, block, top_k):
    module = variants.attention(BlockAttention, block=block, top_k=top_k)
    x, positions, documents = packed
    q, keys, v = variants.plain_heads(module.full, x, positions)
    mask = plain_mask(q, keys, positions, documents, block, top_k)
    out = np.zeros_like(q)
    valid = np.asarray(documents) > 0
    for b, h, t in np.ndindex(len(PACKED), H, q.shape[1]):
        if valid[b, t]:
            seen = np.flatnonzero(mask[b, h, t])
            weights = variants.plain_softmax(keys[b, seen, h] @ q[b, t, h] / np.sqrt(X))
            out[b, t, h] = weights @ v[b, seen, h]
    result = jax.jit(module)(*packed).output
    assert jnp.isfinite(result).all()
    expected = variants.plain_output(module.full, out)
    np.testing.assert_allclose(result[valid], expected[valid], atol=1e-5)


def test_enough_blocks_are_full_attention_in_output_and_gradient(packed):
    module = variants.attention(BlockAttention, block=3, top_k=5)
    some = variants.attention(BlockAttention, block=3, top_k=2)
    x, positions, documents = packed
    valid = (documents > 0)[..., None]

    @jax.jit
    def both(x):
        full = module.full(x, positions, documents)[0]
        return [jnp.where(valid, y, 0.0) for y in (module(x, *packed[1:]).output, full)]

    gradients = jax.jit(jax.jacrev(lambda x: [jnp.sum(jnp.sin(y)) for y in both(x)]))(x)
    assert isinstance(module.full, Attention)
    np.testing.assert_allclose(*both(x), atol=1e-6)
    np.testing.assert_allclose(*gradients, atol=1e-5)
    fewer = jnp.where(valid, some(*packed).output, 0.0)
    assert np.abs(fewer - both(x)[0]).max() > 0.01


def test_own_block_always_and_never_more_than_asked(packed):
    x, positions, documents = packed
    module = variants.attention(BlockAttention, block=2, top_k=3)
    mask = mask_of(module, x, positions, documents)
    mask, rows = np.asarray(mask), np.arange(13)
    assert mask[:, :, rows, rows].all()
    assert not np.triu(mask, 1).any()
    for t in range(13):  # the first row is one document
        blocks = {(h, s // 2) for h, s in zip(*np.nonzero(mask[0, :, t]), strict=True)}
        assert len(blocks) == H * min(3, t // 2 + 1)
        assert all((h, t // 2) in blocks for h in range(H))


def test_the_best_block_is_the_one_whose_mean_key_points_at_the_query():
    keys = jnp.eye(4)[jnp.array([0, 0, 1, 1, 2, 2, 3, 3])][None, :, None]  # [1 8 1 4], blocks of 2
    q = jnp.broadcast_to(jnp.eye(4)[1], (1, 8, 1, 4))
    here, _ = places(jnp.arange(8)[None], jnp.ones((1, 8), int))
    mask = jax.jit(partial(block_mask, block=2, top_k=2))(q, keys, here, here)
    np.testing.assert_array_equal(mask[0, 0, 7], [0, 0, 1, 1, 0, 0, 1, 1])
    # While block 1 is the query's own, the tie among the others goes to the first.
    np.testing.assert_array_equal(mask[0, 0, 2], [1, 1, 1, 0, 0, 0, 0, 0])


def test_selection_has_no_gradient_of_its_own(packed):
    x, positions, documents = packed
    module = variants.attention(BlockAttention, block=2, top_k=2)
    mask = mask_of(module, x, positions, documents)

    def routed(x):
        return jnp.sum(jnp.sin(module(x, positions, documents).output))

    def given_mask(x):
        q, k, v = module.full.rotated(module.full.heads(x), positions)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return jnp.sum(jnp.sin(module.full.merged(out)))

    gradients = jax.jit(lambda x: (jax.grad(routed)(x), jax.grad(given_mask)(x)))(x)
    assert np.abs(gradients[0]).max() > 0.01
    np.testing.assert_allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("at", [3, 8])
def test_no_output_depends_on_later_tokens(packed, at):
    module = variants.attention(BlockAttention, block=3, top_k=2)
    before, after = variants.future_leaks(module, *packed, at)
    assert before < 1e-6
    assert after > 0.01


def test_documents_do_not_see_each_other(packed):
    x, positions, documents = packed
    module = variants.attention(BlockAttention, block=2, top_k=3)
    call = jax.jit(lambda x: module(x, positions, documents).output)
    moved = np.abs(call(x) - call(x.at[1, :5].add(1.0))).max(axis=-1)
    assert moved[1, :5].max() > 0.01
    assert moved[1, 5:12].max() < 1e-6
    # A document is answered alike wherever it stands in a row.
    alone = jax.jit(module)(x[1:2, 5:12], positions[1:2, 5:12], documents[1:2, 5:12]).output
    np.testing.assert_allclose(call(x)[1:2, 5:12], alone, atol=1e-5)


@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_cached_steps_equal_teacher_forcing(qk_norm):
    module = variants.attention(BlockAttention, block=3, top_k=2, qk_norm=qk_norm)
    zeros = jnp.zeros((2, 14, Q, X))
    variants.cached_equals_full(module, KeyValues(zeros, zeros), length=12, prompt=4)


def test_a_cache_with_gaps_is_refused():
    module = variants.attention(BlockAttention, block=3, top_k=2)
    zeros = jnp.zeros((1, 4, Q, X))
    cache = KeyValues(zeros, zeros, jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(ConfigError, match="leave tokens out"):
        jax.eval_shape(module, *variants.inputs([2]), cache, jnp.int32(0))


@pytest.mark.parametrize("options", [{"block": 0}, {"top_k": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        variants.attention(BlockAttention, **options)
