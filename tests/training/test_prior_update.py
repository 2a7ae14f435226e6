"""The prior moves by what ruling an expert out costs on held-out text, and by nothing else."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import setup
from moe.dispatch.reference import reference
from moe.errors import ConfigError
from moe.evaluation.evaluate import prior_metrics
from moe.model.layer import Call
from moe.routing import prior
from moe.training.objective import forward
from moe.training.prior_update import (
    Ablations,
    PriorUpdate,
    make_ablation_step,
    routers_with_prior,
    update_prior,
)
from tests import tiny

NAMES = ("random_path", "random_path_sampled", "prior")
BYTES = jnp.ones(tiny.VOCAB, jnp.int32)
KEY = jax.random.key(3)


def model(name: str) -> tiny.Model:
    paths = ["router.paths=2"] if "path" in name else []
    return tiny.model(f"router.name={name}", "router.k=2", "model.num_experts=4", *paths)


@functools.cache
def ablate(name: str) -> Any:
    made = model(name)
    return jax.jit(make_ablation_step(made.spec, made.skeleton, reference, BYTES))


def uniform(router: dict) -> dict:
    """With the prior as it starts, and the rest of the state as it is."""

    def start(path: tuple, leaf: jax.Array) -> jax.Array:
        return jnp.full_like(leaf, -np.log(4)) if path[-1].key == "log_prior" else leaf

    return jax.tree_util.tree_map_with_path(start, router)


def state_of(router: dict) -> dict:
    return router["blocks"]["layer0"]["mlp"]["state"]


def test_these_routers_have_a_prior():
    assert set(routers_with_prior()) == set(NAMES)


@pytest.mark.parametrize("name", ["prior", "random_path_sampled"])
def test_sums_are_those_of_one_pass_for_each_expert_ruled_out(name):
    made, batch = model(name), tiny.batch()
    router = uniform(made.router)
    sums = ablate(name)(made.params, router, batch, KEY)

    @jax.jit
    def nll(router: dict) -> jax.Array:
        call = Call(batch.tokens, batch.valid, reference, key=KEY)
        return forward(made.skeleton, made.params, router, batch, call, BYTES).rows.nll.sum()

    np.testing.assert_allclose(sums.nll, nll(router), rtol=1e-5)
    assert float(sums.predictions) == batch.valid.sum()
    for layer, expert in ((0, 0), (0, 3), (1, 2)):
        state = state_of(router)
        one = prior.without({"log_prior": state["log_prior"][layer]}, expert)["log_prior"]
        changed = {**state, "log_prior": state["log_prior"].at[layer].set(one)}
        masked = {"blocks": {"layer0": {"mlp": {"state": changed}}}}
        np.testing.assert_allclose(sums.nll_without[layer, expert], nll(masked), rtol=1e-5)
    spread = np.asarray(sums.nll_without - sums.nll)
    assert np.abs(spread).min() > 1e-4, "each expert is used, and is missed or not"


def test_round_is_hedge_on_the_rewards_and_touches_the_prior_alone():
    made = model("random_path")
    router = uniform(made.router)
    sums = ablate("random_path")(made.params, router, tiny.batch(), KEY)
    new = update_prior(made.spec, router, sums, rate=0.1, floor=0.05)
    rewards = (np.asarray(sums.nll_without) - float(sums.nll)) / float(sums.predictions)
    z = (rewards - rewards.mean(axis=1, keepdims=True)) / rewards.std(axis=1, keepdims=True)
    weight = np.exp(0.1 * z)
    expected = 0.95 * weight / weight.sum(axis=1, keepdims=True) + 0.05 / 4
    found = np.exp(state_of(new)["log_prior"])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    before, after = state_of(router), state_of(new)
    assert set(after) == {"log_prior", "cost", "weight"}
    for name in ("cost", "weight"):
        np.testing.assert_array_equal(after[name], before[name])
    same = update_prior(made.spec, router, sums, rate=0.0, floor=0.0)
    np.testing.assert_allclose(state_of(same)["log_prior"], -np.log(4), rtol=1e-6)


def test_planted_module_gains_round_by_round_in_its_own_layer():
    made = model("prior")
    router = uniform(made.router)
    without = jnp.full((2, 4), 5.0).at[1, 2].set(9.0)
    sums = Ablations(jnp.float32(5.0), without, jnp.float32(10.0))
    shares = [0.25]
    for _ in range(60):
        router = update_prior(made.spec, router, sums, rate=0.1, floor=0.05)
        shares.append(float(np.exp(state_of(router)["log_prior"][1, 2])))
    assert all(later > earlier for earlier, later in itertools.pairwise(shares[:9]))
    assert shares[-1] > 0.6
    found = np.exp(np.asarray(state_of(router)["log_prior"], np.float64))
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)
    assert found.min() >= 0.05 / 4 * (1 - 1e-5)
    np.testing.assert_allclose(found[0], 0.25, rtol=1e-5)
    told = prior_metrics(router)["routing/per_layer/prior_entropy"]
    assert told[0] == pytest.approx(np.log(4), rel=1e-5)
    assert told[1] < 1.3


def test_round_depends_on_step_and_state_alone():
    made = model("random_path_sampled")
    router, asked = uniform(made.router), []

    def batch(number: int) -> Any:
        asked.append(number)
        return tiny.batch(seed=number)

    update = PriorUpdate(
        ablate("random_path_sampled"),
        jax.jit(functools.partial(update_prior, made.spec)),
        batch,
        KEY,
        every=5,
        batches=2,
        rate=0.1,
        floor=0.05,
    )
    assert [step for step in range(1, 16) if update.due(step)] == [5, 10, 15]
    first, told = update(10, made.params, router)
    update(15, made.params, router)
    again, told_again = update(10, made.params, router)
    assert asked == [2, 3, 4, 5, 2, 3]
    assert told == told_again
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert 2.0 < told["loss/cross_entropy"] < 12.0
    assert told["routing/reward_spread"] > 0.0


def test_router_without_a_prior_is_refused_before_data_is_read():
    config = tiny.config("prior.every=5", "data.name=files", "data.files=none/*.txt")
    with pytest.raises(ConfigError, match=r"prior\.every=5.*'topk'.*Set prior\.every=0"):
        setup.set_up(config)


def test_notes_are_on_what_is_seldom_meant():
    assert setup.notes(tiny.config()) == []
    assert setup.notes(tiny.config("losses.entropy=0.1")) == []
    (note,) = setup.notes(tiny.config("losses.entropy=0.1", "losses.balance=0.0"))
    assert "losses.entropy=0.1" in note
    alone = ["losses.entropy=0.1", "losses.balance=0.0", "router.name=deepseek_v3"]
    assert setup.notes(tiny.config(*alone)) == [], "its bias balances"
    (note,) = setup.notes(tiny.config("router.name=prior"))
    assert "prior.every" in note
    assert setup.notes(tiny.config("router.name=prior", "prior.every=5")) == []
