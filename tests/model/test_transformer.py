"""The whole model: causality, packing, padding, depth, rematerialisation and its options."""

import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.capacity import capacity
from moe.dispatch.grouped import grouped
from moe.dispatch.reference import reference
from moe.dispatch.table import make_dispatch
from moe.model.block import Stream
from moe.model.layer import Call
from moe.routing.table import ROUTERS
from moe.training.state import bind
from tests import tiny

# Those of every way in which a decision reaches beyond its own token: state, ids, earlier tokens,
# depth, groups, variable numbers, a causal form of a noncausal router.
ROUTER_OPTIONS: dict[str, tuple[str, ...]] = {
    "topk": (),
    "random": (),
    "hash": (),
    "deepseek_v3": ("router.groups=4", "router.groups_kept=2"),
    "segment": ("router.segment_size=4",),
    "lory": ("router.k=1", "router.segment=4"),
    "random_path": ("router.k=2", "router.paths=2"),
    "recurrent": (),
    "expert_choice": (),
}
DISPATCHES = {
    "reference": make_dispatch("reference", None),
    "grouped": grouped,
    "capacity": functools.partial(capacity, capacity_factor=0.75),
}


def of_router(name: str, dispatch: str = "reference") -> tiny.Model:
    options = (f"router.name={name}", *ROUTER_OPTIONS[name])
    return tiny.model(*options, dispatch=DISPATCHES[dispatch])


def change_after(batch, t: int):
    """Other tokens in every row after position t."""
    later = jnp.arange(tiny.S) > t
    other = jnp.where(later[None] & batch.valid, (batch.tokens + 7) % tiny.VOCAB, batch.tokens)
    return batch._replace(tokens=other)


@pytest.mark.parametrize(
    ("router", "dispatch"),
    [*((name, "reference") for name in ROUTER_OPTIONS), ("topk", "grouped"), ("topk", "capacity")],
)
def test_later_tokens_change_nothing_before_them(router, dispatch):
    model, batch, key = of_router(router, dispatch), tiny.batch(((16,), (16,), (16,))), None
    if ROUTERS[router].needs_key_in_eval:
        key = jax.random.key(0)
    out = model(batch, key=key)
    for t in (0, 6, 14):
        changed = model(change_after(batch, t), key=key)
        at = slice(0, t + 1)
        np.testing.assert_allclose(changed.logits[:, at], out.logits[:, at], atol=1e-5)
        np.testing.assert_array_equal(
            changed.reports.expert[:, :, at], out.reports.expert[:, :, at]
        )
        assert np.abs(changed.logits[:, t + 1 :] - out.logits[:, t + 1 :]).max() > 0.1
    if dispatch == "capacity":
        assert (out.reports.expert == -1).any(), "nothing was dropped: the case tests nothing"


def test_every_layer_and_key_draws_its_own_noise():
    model, batch = of_router("random"), tiny.batch(((16,), (16,), (16,)))
    one, two = (model(batch, key=jax.random.key(seed)).reports.expert for seed in (0, 1))
    for drawn, other in ((one[0], one[1]), (one, two)):
        assert 0.05 < (drawn == other).mean() < 0.3, "1 of 8 by chance"


@pytest.mark.parametrize("router", ["topk", "hash"])
def test_packed_documents_equal_documents_alone(router):
    model = of_router(router)
    packed = tiny.batch(((7, 6), (7,), (6,)))
    tokens = packed.tokens.at[1, :7].set(packed.tokens[0, :7]).at[2, :6].set(packed.tokens[0, 7:13])
    out = model(packed._replace(tokens=tokens))
    for alone, own in ((slice(0, 7), (1, slice(0, 7))), (slice(7, 13), (2, slice(0, 6)))):
        np.testing.assert_allclose(out.logits[0, alone], out.logits[own], atol=1e-5)
        np.testing.assert_array_equal(
            out.reports.expert[:, 0, alone], out.reports.expert[:, own[0], own[1]]
        )


@pytest.mark.parametrize("dispatch", ["grouped", "capacity"])
def test_padding_changes_nothing(dispatch):
    model = of_router("topk", dispatch)
    batch = tiny.batch()
    junk = jnp.where(batch.valid, batch.tokens, 5)
    out, other = model(batch), model(batch._replace(tokens=junk))
    np.testing.assert_array_equal(other.logits[batch.valid], out.logits[batch.valid])
    jax.tree.map(np.testing.assert_array_equal, other.reports, out.reports)
    assert (np.asarray(out.reports.expert)[:, ~np.asarray(batch.valid)] == -1).all()


def test_scan_is_the_layers_in_order():
    """Dense layers first, then the pattern; reports in the order of depth."""
    model = tiny.model(
        "model.num_layers=5",
        "model.first_dense=1",
        "model.pattern=sparse,dense",
        "model.dropout=0.2",
    )
    batch = tiny.batch()
    scanned = model(batch)

    @jax.jit
    def unrolled(params, router):
        whole = bind(model.skeleton, params, router)
        call = Call(batch.tokens, batch.valid, reference)
        stream, reports = Stream(whole.embedding[...][batch.tokens]), []
        for stack, turns in ((whole.first, 1), (whole.blocks, 2)):
            graph, state = nnx.split(stack)
            for i in range(turns):
                turn = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))
                for block in turn.blocks():
                    done = block(stream, batch.positions, batch.segments, call, None, None, None)
                    stream, reports = done.stream, [*reports, *done.reports]
        return whole._logits(whole.norm(stream.x), call), jax.tree.map(
            lambda *r: jnp.stack(r), *reports
        )

    logits, reports = unrolled(model.params, model.router)
    assert scanned.reports.expert.shape == (2, tiny.B, tiny.S, 2)
    np.testing.assert_allclose(scanned.logits, logits, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scanned.reports, reports)
    assert (np.asarray(reports.expert[0]) != np.asarray(reports.expert[1])).any()


def test_remat_keeps_loss_gradients_and_choices():
    batch, results, sorts = tiny.batch(), {}, {}
    for policy in ("none", "full", "dots"):
        model = tiny.model(f"model.remat={policy}", "model.num_layers=1")

        def loss(params, model=model):
            call = Call(batch.tokens, batch.valid, reference)
            out: Any = bind(model.skeleton, params, {})(batch.positions, batch.segments, call)
            probe = jnp.cos(jnp.arange(out.logits.size)).reshape(out.logits.shape)
            aux = out.reports.row_probs[0, :, 0].sum() + out.reports.row_lse_squared.sum()
            return (out.logits * probe).sum() + aux, out.reports.expert

        grad = jax.value_and_grad(loss, has_aux=True)
        results[policy] = jax.jit(grad)(model.params)
        sorts[policy] = str(jax.make_jaxpr(grad)(model.params)).count("= top_k")
    # The backward pass must not choose anew: its rounding could differ.
    assert sorts["none"] == sorts["full"] == sorts["dots"] > 0
    (value, experts), gradients = results["none"]
    for policy in ("full", "dots"):
        (other, chosen), grads = results[policy]
        np.testing.assert_allclose(other, value, rtol=1e-6)
        np.testing.assert_array_equal(chosen, experts)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, gradients)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradients))


def test_dropout_is_off_in_evaluation():
    model, batch = tiny.model("model.dropout=0.3"), tiny.batch()
    keys = jax.random.split(jax.random.key(0))
    off = [model(batch, key=key, dropout=None).logits for key in keys]
    on = [model(batch, key=key, dropout=jnp.float32(0.3)).logits for key in keys]
    np.testing.assert_array_equal(off[0], off[1])
    assert np.abs(on[0] - off[0]).max() > 0.1
    assert np.abs(on[0] - on[1]).max() > 0.1
    none = model(batch, key=keys[0], dropout=jnp.float32(0.0)).logits
    np.testing.assert_allclose(none, off[0], atol=1e-5)


def test_logit_softcap_bounds_logits():
    batch = tiny.batch()
    plain = tiny.model()(batch).logits
    capped = tiny.model("model.logit_softcap=2.0")(batch).logits
    assert np.abs(plain).max() > 2.0
    np.testing.assert_allclose(capped, 2.0 * np.tanh(plain / 2.0), atol=1e-5)


def test_tied_embeddings_are_the_head():
    tied, untied = tiny.model("model.tie_embeddings=true"), tiny.model()
    assert "head" not in tied.params
    params = {**tied.params, "head": tied.params["embedding"].T}
    logits = untied._replace(params=params)(tiny.batch()).logits
    np.testing.assert_allclose(tied(tiny.batch()).logits, logits, atol=1e-5)


def test_dense_model_reports_nothing():
    model = tiny.model("model.pattern=dense")
    assert model.spec.sparse_layers == 0
    assert model(tiny.batch()).reports is None
    assert model.router == {}
