"""Experts of several kinds behind one router, and noise on weights, inside the whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.model.build import model_size, model_spec
from moe.routing.loss_table import Active, compute
from tests import tiny
from tests.model import wired

ONE = "model.num_layers=1"
KINDS = (
    "model.num_experts=4",
    "model.conv_experts=2",
    "model.zero_experts=1",
    "model.copy_experts=1",
    "model.constant_experts=2",
)


def mixed(*more: str) -> tiny.Model:
    return wired.model("model.num_layers=2", *KINDS, *more)


def test_the_router_chooses_from_all_kinds_and_dispatch_sees_its_own():
    model, batch = mixed(), tiny.batch()
    out = model(batch)
    assert out.reports.row_probs.shape[-1] == 10
    expert = np.asarray(out.reports.expert)
    assert set(np.unique(expert)) == {-1, *range(10)}
    # Nothing is dropped: what the router asked for was kept, experts without a network included.
    np.testing.assert_array_equal(out.reports.row_kept, out.reports.row_requested)
    assert (expert[:, np.asarray(batch.valid)] >= 0).all()
    assert model.params["blocks"]["layer0"]["mlp"]["experts"]["wi"].shape[1] == 4
    gradient, _ = wired.gradients(model, batch)
    wired.assert_learns(gradient["blocks"]["layer0"]["mlp"])


@pytest.mark.parametrize("router", ["topk", "segment"])
def test_conv_experts_look_back_in_generation(router):
    """With a router that decides by the token alone, and with one that looks back itself."""
    more = () if router == "topk" else ("router.name=segment", "router.segment_size=4")
    model = mixed(*more)
    wired.check_cached(model)
    wired.check_causal(model)


def test_without_convolution_generation_keeps_no_history():
    assert mixed().spec.looks_back
    assert not mixed("model.conv_kernel=1").spec.looks_back


def test_copy_and_zero_experts_cost_nothing():
    plain, cheap = (
        model_size(model_spec(tiny.config(ONE, *more), tiny.VOCAB), 16)
        for more in ((), ("model.zero_experts=4", "model.copy_experts=4"))
    )
    gate, experts = 32 * 8, 8 * 3 * 32 * 32
    assert cheap.parameters_total == plain.parameters_total + gate
    # Half of the experts to choose from: half of the choices reach one with a network.
    assert cheap.parameters_active == plain.parameters_active + gate - experts * 2 / 8 / 2
    assert cheap.flops_per_token == plain.flops_per_token + 2 * (gate - experts * 2 / 8 / 2)


def test_convolutions_run_for_every_token():
    plain, conv = (
        model_size(model_spec(tiny.config(ONE, "router.k=8", *more), tiny.VOCAB), 16)
        for more in ((), ("model.conv_experts=8",))
    )
    gate, each, experts = 32 * 8, 3 * 32 + 32 * 32, 8 * 3 * 32 * 32
    assert conv.parameters_total - plain.parameters_total == gate + 8 * each
    assert conv.parameters_active - plain.parameters_active == gate + 4 * each - experts / 2
    more_flops = conv.flops_per_token - plain.flops_per_token
    assert more_flops == 2 * (gate + 8 * each - experts / 2)


def test_heterogeneous_loss_knows_which_experts_are_free():
    model, batch = mixed(), tiny.batch()
    report = model(batch).reports
    free = model.spec.free_experts
    assert free == (False,) * 6 + (True,) * 4
    inputs = {"report": report, "total_tokens": float(batch.valid.sum()), "free": jnp.asarray(free)}
    weighed = [
        compute((Active("heterogeneous", (("tau", tau), ("factor", 10.0))),), inputs)[
            "heterogeneous"
        ]
        for tau in (0.0, 0.5, 1.0)
    ]
    balance = compute((Active("balance", (("scope", "microbatch"),)),), inputs)["balance"]
    np.testing.assert_allclose(weighed[2], balance, rtol=1e-5)
    np.testing.assert_allclose(weighed[1], (weighed[0] + weighed[2]) / 2, rtol=1e-5)
    assert weighed[0] < weighed[2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.zero_experts=1", "router.name=expert_choice"), "whose plan is slots"),
        (("model.copy_experts=1", "router.name=soft_moe"), "whose plan is mixing"),
        (("model.zero_experts=1", "model.pattern=dense"), "without sparse layers"),
        (("model.zero_experts=-1",), "must not be negative"),
        (("model.conv_kernel=0",), "greater than 0"),
        (("weight_noise.target=all",), "target='all'"),
        (("weight_noise.mode=white",), "mode='white'"),
        (("weight_noise.scale=-1.0",), "scale=-1.0"),
        (("weight_noise.target=gate", "router.name=hash"), "has no gate"),
        (("weight_noise.target=experts", "model.pattern=dense"), "neither gate nor"),
    ],
)
def test_what_cannot_work_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        model_spec(tiny.config(*overrides), tiny.VOCAB, training=False)


@pytest.mark.parametrize(
    ("target", "mode"),
    [
        ("gate", "relative"),
        ("experts", "factorised"),
        pytest.param("gate", "factorised", marks=pytest.mark.slow),
        pytest.param("experts", "relative", marks=pytest.mark.slow),
    ],
)
def test_weight_noise_is_drawn_in_training_alone(target, mode):
    noise = (f"weight_noise.target={target}", f"weight_noise.mode={mode}")
    model = wired.model(ONE, *noise, "weight_noise.scale=0.5")
    plain, batch = wired.model(ONE), tiny.batch()
    params = jax.tree.map(lambda a: a, model.params)
    mlp = params["blocks"]["layer0"]["mlp"]
    learned = mlp.pop(f"noisy_{target}", None)
    assert (learned is None) == (mode == "relative")
    bare = plain._replace(params=params)
    np.testing.assert_array_equal(model(batch).logits, bare(batch).logits)
    run = jax.jit(lambda key: wired.train(model, batch, key))
    one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.logits, again.logits)
    assert np.abs(one.logits - other.logits).max() > 0.01
    moved = np.abs(one.reports.row_probs - other.reports.row_probs).max()
    assert (moved > 1e-3) == (target == "gate"), "the gate decides by its own weights alone"
    gradient, _ = wired.gradients(model, batch)
    wired.assert_learns(gradient["blocks"]["layer0"]["mlp"])


def test_noise_of_scale_zero_is_the_plain_model():
    model = wired.model(ONE, "weight_noise.target=experts", "weight_noise.scale=0.0")
    batch = tiny.batch()
    quiet = jax.jit(lambda key: wired.train(model, batch, key))(jax.random.key(0))
    np.testing.assert_allclose(quiet.logits, model(batch).logits, atol=1e-5)
