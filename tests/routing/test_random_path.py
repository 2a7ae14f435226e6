import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from moe.errors import ConfigError
from moe.routing import random_path
from tests.routing.cases import random_logits

N, D, E = 20000, 6, 5
KEY = jax.random.key(8)


def softmax(x):
    x = np.exp(np.asarray(x, np.float64))
    return x / x.sum(-1, keepdims=True)


@functools.cache
def stage(seed=0, num_experts=E, paths=1, **options):
    """A gate whose transitions are as strong as its scores."""
    gate = random_path.PathGate(D, num_experts, rngs=nnx.Rngs(seed), paths=paths, **options)
    gate.transition[...] = jnp.asarray(random_logits((num_experts, num_experts), seed=seed + 20))
    return nnx.split(gate)


@functools.partial(jax.jit, static_argnames=("graph", "k", "options"))
def routed(graph, params, tokens, memory, state, key, *, k, options):
    gated = nnx.merge(graph, params)(tokens, memory=memory, state=state, key=key)
    routing = random_path.route(
        gated.logits,
        jnp.ones(tokens.shape[:2], bool),
        k=k,
        key=key,
        state=state,
        **gated.inputs,
        **dict(options),
    )
    return routing, gated


def walk(tokens, gate, *, k=1, memory=None, state=None, key=KEY, **options):
    graph, params = gate
    experts = params["kernel"][...].shape[-1]
    if memory is None:
        memory = random_path.PathGate.initial_memory(*tokens.shape[:2], experts, paths=k)
    arrays = (jnp.asarray(tokens), jnp.asarray(memory), state, key)
    options = tuple(sorted(options.items()))
    return jax.device_get(routed(graph, params, *arrays, k=k, options=options))


def same_token(n=N):
    return np.broadcast_to(np.random.default_rng(0).normal(size=D).astype(np.float32), (1, n, D))


def weights(plan, num_experts=E):
    """The plan as weights [N E]."""
    return (np.eye(num_experts)[plan.expert] * plan.gate[..., None]).sum(axis=2)[0]


def test_the_sources_example_once_its_mistakes_are_mended():
    w = np.array([0.1, -0.2, 0.3, -0.4, 0.5])
    P = softmax(w)
    np.testing.assert_allclose(P, [0.1976, 0.1464, 0.2414, 0.1199, 0.2948], atol=5e-5)
    drawn = random_path.inverse_cdf(jnp.asarray(P, jnp.float32), jnp.float32(0.6))
    assert int(drawn) == np.searchsorted(np.cumsum(P), 0.6, "right") == 3
    assert "BCDEF"[int(drawn)] == "E"


def test_inverse_cdf_follows_the_probabilities_and_never_leaves_the_range():
    P = np.array([0.1, 0.0, 0.45, 0.25, 0.2])
    u = np.random.default_rng(1).random(N).astype(np.float32)
    drawn = random_path.inverse_cdf(
        jnp.broadcast_to(jnp.asarray(P, jnp.float32), (N, 5)), jnp.asarray(u)
    )
    counts = np.bincount(drawn, minlength=5)
    assert counts[1] == 0
    assert chisquare(counts[P > 0], N * P[P > 0]).pvalue > 1e-4
    short = jnp.full((1, 3), 0.333)  # sums to 0.999
    assert random_path.inverse_cdf(short, jnp.array([0.9995])).tolist() == [2]
    assert random_path.inverse_cdf(short, jnp.array([0.0])).tolist() == [0]


def test_chances_are_rows_of_a_softmax_of_transition_score_and_prior():
    graph, params = stage(temperature=0.7, prior_weight=2.0)
    tokens = random_logits((2, 3, D))
    standing = np.array([[0, 1, 2], [3, 4, 0]])
    log_prior = np.log(softmax(random_logits((E,), seed=3))).astype(np.float32)
    routing, gated = walk(
        tokens,
        (graph, params),
        memory=np.eye(E, dtype=np.float32)[standing].reshape(2, 3, -1),
        state={"log_prior": jnp.asarray(log_prior)},
    )
    scores = tokens @ np.asarray(params["kernel"][...])
    w = np.asarray(params["transition"][...])[standing]
    expected = softmax((w + scores + 2.0 * log_prior) / 0.7)
    np.testing.assert_allclose(gated.inputs["path_probs"][:, :, 0], expected, rtol=1e-4)
    np.testing.assert_allclose(routing.probs, expected, rtol=1e-4)
    np.testing.assert_allclose(routing.probs.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(routing.logits, w + scores, rtol=1e-4, atol=1e-5)


def test_a_start_that_is_not_known_is_the_mean_over_starts():
    gate = stage()
    tokens = same_token(1)
    rows = [
        walk(tokens, gate, memory=np.eye(E, dtype=np.float32)[i].reshape(1, 1, -1))[0].probs
        for i in range(E)
    ]
    unknown = walk(tokens, gate)[0].probs
    np.testing.assert_allclose(unknown, np.mean(rows, axis=0), rtol=1e-5)


@pytest.mark.parametrize("gradient", ["gate", "straight_through"])
def test_the_mean_over_paths_is_the_dense_mixture(gradient):
    routing, _ = walk(same_token(), stage(paths=2), k=2, gradient=gradient)
    sampled = weights(routing.plan)
    P = routing.probs[0, 0]
    assert (np.abs(sampled.mean(0) - P) < 5 * sampled.std(0) / np.sqrt(N)).all()
    np.testing.assert_allclose(sampled.sum(-1), 1.0, rtol=1e-6)


def test_variance_falls_as_one_over_the_number_of_paths():
    outputs = np.random.default_rng(2).normal(size=E)
    variance = [
        (weights(walk(same_token(), stage(paths=M), k=M)[0].plan) @ outputs).var() for M in (1, 4)
    ]
    assert 3.6 < variance[0] / variance[1] < 4.4


def test_the_mean_gradient_of_one_stage_is_that_of_the_dense_mixture():
    graph, params = stage()
    outputs = jnp.asarray(np.random.default_rng(3).normal(size=E), jnp.float32)
    tokens = jnp.asarray(same_token())
    memory = random_path.PathGate.initial_memory(1, N, E, paths=1)

    def with_transition(w):
        copy = jax.tree.map(lambda x: x, params)
        copy["transition"][...] = w
        return nnx.merge(graph, copy)(tokens, memory=memory, key=KEY)

    def sampled(w):
        gated = with_transition(w)
        plan = random_path.route(
            gated.logits, jnp.ones((1, N), bool), k=1, key=KEY, **gated.inputs
        ).plan
        return ((jax.nn.one_hot(plan.expert, E) @ outputs) * plan.gate)[0, :, 0]

    def dense(w):
        return with_transition(w).inputs["path_probs"][0, 0, 0] @ outputs

    w, direction = params["transition"][...], jnp.asarray(random_logits((E, E), seed=4))
    per_draw = np.asarray(jax.jit(lambda w: jax.jvp(sampled, (w,), (direction,))[1])(w))
    exact = jax.jit(lambda w: jax.jvp(dense, (w,), (direction,))[1])(w)
    assert abs(per_draw.mean() - exact) < 5 * per_draw.std() / np.sqrt(N)
    assert abs(exact) > 1e-2


def test_two_stages_walked_many_times_are_where_the_mean_says():
    tokens = same_token()
    first, second = (stage(seed=s, eval_mode="map") for s in (0, 1))
    _, gated = walk(tokens, first)
    routing, _ = walk(tokens, second, memory=gated.memory, key=jax.random.key(9))
    counts = np.bincount(routing.plan.expert.ravel(), minlength=E)

    first, second = (stage(seed=s, eval_mode="mean") for s in (0, 1))
    one = same_token(1)
    _, gated = walk(one, first, key=None, eval_mode="mean")
    expected, _ = walk(one, second, memory=gated.memory, key=None, eval_mode="mean")
    P = expected.probs[0, 0].astype(np.float64)
    assert chisquare(counts, N * P / P.sum()).pvalue > 1e-4
    np.testing.assert_array_equal(expected.plan.expert[0, 0], np.arange(E))
    np.testing.assert_allclose(expected.plan.gate[0, 0], P, rtol=1e-5)


def test_memory_is_where_each_path_went():
    _, gated = walk(random_logits((2, 3, D)), stage(paths=3), k=3)
    went = gated.memory.reshape(2, 3, 3, E)
    np.testing.assert_array_equal(went.argmax(-1), gated.inputs["path_expert"])
    np.testing.assert_array_equal(went.sum(-1), 1.0)


def test_the_last_step_decides_the_next():
    """The shuffled control: with equal rows of transitions, where a path stands does not matter."""
    graph, params = stage()
    flat = jax.tree.map(lambda x: x, params)
    flat["transition"][...] = jnp.broadcast_to(params["transition"][...][:1], (E, E))
    starts = [np.eye(E, dtype=np.float32)[i].reshape(1, 1, -1) for i in (0, 1)]
    probs = [walk(same_token(1), (graph, params), memory=m)[0].probs for m in starts]
    assert np.abs(probs[0] - probs[1]).max() > 0.05
    control = [walk(same_token(1), (graph, flat), memory=m)[0].probs for m in starts]
    np.testing.assert_allclose(*control, rtol=1e-6)


def test_without_a_key_or_at_no_temperature_the_likeliest_module_is_taken():
    tokens = random_logits((2, 3, D))
    likely, _ = walk(tokens, stage(), key=None)
    np.testing.assert_array_equal(likely.plan.expert[..., 0], likely.probs.argmax(-1))
    memory = np.broadcast_to(np.eye(E, dtype=np.float32)[2], (2, 3, E))
    cold, _ = walk(tokens, stage(temperature=1e-4), memory=memory)
    warm, _ = walk(tokens, stage(), memory=memory, key=None)
    np.testing.assert_array_equal(cold.plan.expert, warm.plan.expert)


def test_paths_that_meet_share_one_choice():
    expert = jnp.array([[[2, 0, 2, 2], [1, 1, 3, 0]]])
    gate = jnp.array([[[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]])
    total, first = random_path.merged(expert, gate)
    assert first.tolist() == [[[True, True, False, False], [True, False, True, True]]]
    np.testing.assert_allclose(total[0, 0, :2], [0.8, 0.2], rtol=1e-6)
    np.testing.assert_allclose(total[0, 1], [0.5, 0.5, 0.25, 0.25], rtol=1e-6)

    plan = walk(same_token(200), stage(paths=4), k=4)[0].plan
    assert not plan.valid.all()
    for expert, valid, gate in zip(plan.expert[0], plan.valid[0], plan.gate[0], strict=True):
        assert len(set(expert[valid])) == valid.sum() == len(set(expert))
        assert not gate[~valid].any()


def test_one_module_is_a_plain_network():
    routing, _ = walk(random_logits((2, 3, D)), stage(num_experts=1, paths=2), k=2)
    np.testing.assert_array_equal(routing.plan.expert, 0)
    np.testing.assert_array_equal(routing.plan.gate.sum(-1), 1.0)


def test_who_shares_a_draw():
    tokens = np.broadcast_to(same_token(1), (8, 16, D))
    batch = walk(tokens, stage(scope="batch"))[0].plan.expert
    assert (batch == batch[0, 0]).all()
    rows = walk(tokens, stage(scope="sequence"))[0].plan.expert
    assert (rows == rows[:, :1]).all()
    assert len(np.unique(rows)) > 1
    assert all(len(np.unique(row)) > 1 for row in walk(tokens, stage(scope="token"))[0].plan.expert)


@pytest.mark.parametrize(("gradient", "moves"), [("gate", True), ("reinforce", False)])
def test_which_gradient_reaches_the_gates(gradient, moves):
    probs = jnp.asarray(softmax(random_logits((1, 4, 2, E))), jnp.float32)
    expert = random_path.step(probs, KEY, "token")

    def total(probs):
        return random_path.route(
            jnp.zeros((1, 4, E)),
            jnp.ones((1, 4), bool),
            k=2,
            path_probs=probs,
            path_expert=expert,
            key=KEY,
            gradient=gradient,
        ).plan.gate.sum()

    assert bool(np.asarray(jax.grad(total)(probs)).any()) is moves


def test_reinforce_tells_the_log_probability_of_the_paths():
    routing, gated = walk(random_logits((2, 3, D)), stage(paths=2), k=2, gradient="reinforce")
    chance = np.take_along_axis(
        gated.inputs["path_probs"], gated.inputs["path_expert"][..., None], axis=-1
    )
    np.testing.assert_allclose(
        routing.terms["token/log_prob"], np.log(chance[..., 0]).sum(-1), rtol=1e-5
    )
    probs = gated.inputs["path_probs"]
    entropy = -(probs * np.log(probs)).sum(-1).mean(-1)
    np.testing.assert_allclose(routing.terms["token/policy_entropy"], entropy, rtol=1e-5)
    assert walk(random_logits((2, 3, D)), stage(paths=2), k=2)[0].terms == {}


def test_renumbering_modules_renumbers_the_steps():
    graph, params = stage()
    order = np.random.default_rng(5).permutation(E)
    moved = jax.tree.map(lambda x: x, params)
    moved["kernel"][...] = params["kernel"][...][:, order]
    moved["transition"][...] = params["transition"][...][order][:, order]
    memory = np.float32(softmax(random_logits((2, 3, E))))
    log_prior = jnp.asarray(random_logits((E,), seed=6))
    a, _ = walk(
        random_logits((2, 3, D)), (graph, params), memory=memory, state={"log_prior": log_prior}
    )
    b, _ = walk(
        random_logits((2, 3, D)),
        (graph, moved),
        memory=memory[..., order],
        state={"log_prior": log_prior[order]},
    )
    np.testing.assert_allclose(b.probs, a.probs[..., order], rtol=1e-4)


def test_average_of_whole_passes():
    logits = jnp.asarray(random_logits((3, 2, 4, E)))
    mean = random_path.average_predictions(logits)
    np.testing.assert_allclose(np.exp(mean), softmax(logits).mean(0), rtol=1e-5)
    geometric = np.log(softmax(logits)).mean(0)
    expected = softmax(geometric)
    by_logits = random_path.average_predictions(logits, "logits")
    np.testing.assert_allclose(np.exp(by_logits), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="neither"):
        random_path.average_predictions(logits, "votes")


def test_state_holds_a_uniform_prior_and_the_baseline():
    state = random_path.init_state(E, 1, 2, KEY)
    np.testing.assert_allclose(np.exp(state["log_prior"]), 1 / E, rtol=1e-6)
    new = random_path.update_state(state, cost=jnp.float32(2.0), baseline_decay=0.5)
    assert float(new["cost"]) == 1.0
    np.testing.assert_array_equal(new["log_prior"], state["log_prior"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 3}, r"router\.paths=3 and router\.k=2 differ.*paths=2"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
        ({"scope": "row"}, "scope='row' is not one of token, sequence, batch"),
        ({"gradient": "soft"}, "gradient='soft' is not one of gate"),
        ({"eval_mode": "mc"}, "eval_mode='mc' is not one of map, mean"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        random_path.check(E, k=2, **options)
