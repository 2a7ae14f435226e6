"""What every router promises, whatever its paper: one file over the table of routers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing.router import pick_inputs
from moe.routing.table import ROUTERS, check_router
from tests.routing.cases import BY_LOGITS, CASES, Case, noise_scale, random_logits, report_of

B, S, E = 3, 6, 8

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_router = pytest.mark.parametrize("case", BY_LOGITS, ids=str)
learned_routers = pytest.mark.parametrize(
    "case", [c for c in BY_LOGITS if c.router.learned], ids=str
)


def test_every_router_of_the_table_is_under_contract():
    assert {case.name for case in CASES} == set(ROUTERS)


@every_router
def test_config_of_each_case_passes_its_own_check(case):
    check_router(case.name, E, k=case.k, **case.options)


@every_router
@pytest.mark.parametrize("kind", ["normal", "equal", "huge", "mixed"])
def test_shapes_types_and_finite_numbers_at_extreme_logits(case, kind):
    logits = {
        "normal": random_logits(),
        "equal": np.full((B, S, E), 3.0, np.float32),
        "huge": np.full((B, S, E), -1e4, np.float32),
        "mixed": np.sign(random_logits()) * np.float32(1e4),
    }[kind]
    routing = case.route(logits)
    assert_well_formed(routing, case, E)


@pytest.mark.parametrize(
    "case", [c for c in BY_LOGITS if c.k == 1 and "groups" not in c.options], ids=str
)
def test_one_token_and_one_expert(case):
    routing = case.route(np.ones((1, 1, 1), np.float32))
    assert_well_formed(routing, case, 1)
    assert routing.plan.expert.item() == 0


def assert_well_formed(routing, case, num_experts):
    plan = routing.plan
    assert plan.expert.dtype == jnp.int32
    assert plan.valid.dtype == jnp.bool_
    for x in (routing.logits, routing.probs, plan.gate, *routing.terms.values()):
        assert x.dtype == jnp.float32
        assert np.isfinite(x).all()
    for name, term in routing.terms.items():
        assert term.shape[:2] == routing.probs.shape[:2], name
    assert routing.probs.shape == routing.logits.shape
    assert plan.expert.shape == plan.gate.shape == plan.valid.shape
    assert plan.expert.shape[:2] == routing.probs.shape[:2]
    if case.fixed:
        assert plan.expert.shape[2] == case.k
    assert 0 <= int(plan.expert.min()) <= int(plan.expert.max()) < num_experts
    assert not np.asarray(plan.gate)[~np.asarray(plan.valid)].any()
    np.testing.assert_allclose(routing.probs.sum(-1), 1.0, rtol=1e-5)


@every_router
def test_different_experts_and_no_negative_gate(case):
    plan = case.route(random_logits()).plan
    times = (jax.nn.one_hot(plan.expert, E) * plan.valid[..., None]).sum(axis=2)
    assert np.asarray(times).max() == 1
    assert (plan.gate >= 0).all()
    if case.fixed:
        assert plan.valid.all()


@every_router
def test_gate_sum(case):
    routing = case.route(random_logits())
    total = routing.plan.gate.sum(-1)
    if isinstance(case.gate_sum, float):
        np.testing.assert_allclose(total, case.gate_sum, rtol=1e-5)
    elif case.gate_sum == "largest":
        best = np.sort(routing.probs, axis=-1)[..., -case.k :].sum(-1)
        np.testing.assert_allclose(total, best, rtol=1e-6)
        assert (total < 1).all()


@pytest.mark.parametrize("case", [c for c in BY_LOGITS if c.permutes], ids=str)
def test_permuting_experts_permutes_the_choices(case):
    logits, state = random_logits(), case.state(E)
    groups = case.options.get("groups", 1)
    rng = np.random.default_rng(0)
    for _ in range(10):
        order = rng.permuted(np.arange(E).reshape(groups, -1), axis=1)  # inside each group
        order = order[rng.permutation(groups)].reshape(-1)  # and groups as a whole
        new_state = {n: value[order] if value.ndim else value for n, value in state.items()}
        a = case.route(logits, state=state)
        b = case.route(logits[..., order], state=new_state)
        for x, y in zip(spread(a.plan, E), spread(b.plan, E), strict=True):
            np.testing.assert_allclose(y, x[..., order], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(b.probs, a.probs[..., order], rtol=1e-5)


def spread(plan, num_experts):
    """Gates and whether chosen, `[B S E]`, of choices in any order."""
    hits = np.asarray(jax.nn.one_hot(plan.expert, num_experts)) * plan.valid[..., None]
    return (hits * plan.gate[..., None]).sum(axis=2), hits.sum(axis=2)


@pytest.mark.parametrize("case", [c for c in CASES if c.name == "hash"], ids=str)
def test_permuting_the_entries_of_a_table_permutes_the_choices(case):
    state, order = case.state(E), np.random.default_rng(0).permutation(E)
    a = case.route(random_logits(), state=state)
    b = case.route(random_logits(), state={"table": order.astype(np.int32)[state["table"]]})
    np.testing.assert_array_equal(b.plan.expert, order[a.plan.expert])


def _of_all(case):
    """The case with k = E, or None where its check refuses that."""
    whole = case._replace(k=E)
    try:
        check_router(case.name, E, k=E, **case.options)
    except ConfigError:
        return None
    return whole


@pytest.mark.parametrize(
    "case", [c for c in BY_LOGITS if c.fixed and c.router.learned and _of_all(c)], ids=str
)
def test_all_experts_make_the_dense_mixture(case):
    """With k = E every expert is chosen, and gates are those of a mixture without any choice."""
    routing = _of_all(case).route(random_logits())
    gates, chosen = spread(routing.plan, E)
    assert (np.asarray(chosen) == 1).all()
    if case.permutes and case.softmax and case.gate_sum in (1.0, "largest"):
        np.testing.assert_allclose(gates, routing.probs, rtol=1e-5)


@pytest.mark.parametrize("case", [c for c in BY_LOGITS if c.tokenwise], ids=str)
def test_permuting_tokens_permutes_the_choices(case):
    logits, order = random_logits(), np.random.default_rng(2).permutation(S)
    ids = np.arange(B * S).reshape(B, S) % 11
    a = spread(case.route(logits, token_ids=ids).plan, E)
    b = spread(case.route(logits[:, order], token_ids=ids[:, order]).plan, E)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(np.asarray(x)[:, order], y, rtol=1e-5, atol=1e-7)


@every_router
def test_a_batch_is_its_rows_one_by_one(case):
    logits, ids = random_logits(), np.arange(B * S).reshape(B, S) % 11
    if case.draws:
        pytest.skip("draws have the shape of the global batch")
    whole = spread(case.route(logits, token_ids=ids).plan, E)
    for b in range(B):
        row = spread(case.route(logits[b : b + 1], token_ids=ids[b : b + 1]).plan, E)
        for x, y in zip(whole, row, strict=True):
            np.testing.assert_allclose(np.asarray(x)[b], y[0], rtol=1e-5, atol=1e-7)


# Noise of strength zero, and the router without any that it must equal.
QUIET = [
    (
        Case(
            "noisy_topk", 3, {"init": "normal", "noise_std": 0.0}, inputs=noise_scale, training=True
        ),
        Case("topk", 3, {"normalize": "topk_softmax"}),
    ),
    (
        Case("gumbel", 2, {"gates": "renormalize", "noise": 0.0}, training=True),
        Case("topk", 2),
    ),
    (
        Case("gumbel", 2, {"gates": "raw", "greedy": 2}, training=True),
        Case("topk", 2, {"normalize": "none"}),
    ),
    (Case("gshard", 2, {"threshold": 0.0}, training=True), Case("topk", 2)),
]


@pytest.mark.parametrize("pair", QUIET, ids=lambda pair: str(pair[0]))
def test_noise_of_strength_zero_is_none(pair):
    noisy, quiet = (spread(case.route(random_logits()).plan, E) for case in pair)
    for x, y in zip(noisy, quiet, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in BY_LOGITS if c.draws and c.router.learned], ids=str)
def test_recomputation_draws_the_same_choices(case):
    """Under rematerialisation the gradient is that of the choices that were made."""
    logits = jnp.asarray(random_logits())
    weight = jnp.asarray(random_logits(seed=5))

    def loss(x):
        routing = case.route(x, compiled=False)
        hits = jax.nn.one_hot(routing.plan.expert, E) * routing.plan.gate[..., None]
        return (hits.sum(axis=2) * weight).sum() + sum(t.sum() for t in routing.terms.values())

    plain, again = (jax.jit(jax.grad(f))(logits) for f in (loss, jax.checkpoint(loss)))
    np.testing.assert_allclose(plain, again, rtol=1e-5, atol=1e-7)


@every_router
def test_other_rows_of_the_batch_change_nothing(case):
    logits, ids = random_logits(), np.arange(B * S).reshape(B, S) % 11
    other_logits = np.concatenate([logits[:1], random_logits(seed=7)[1:] * 3])
    other_ids = np.concatenate([ids[:1], (ids[1:] + 4) % 11])
    a = case.route(logits, token_ids=ids).plan
    b = case.route(other_logits, token_ids=other_ids).plan
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x[0], y[0])


@pytest.mark.parametrize("case", [c for c in BY_LOGITS if c.causal], ids=str)
def test_later_tokens_change_nothing(case):
    logits, ids = random_logits(), np.arange(B * S).reshape(B, S) % 11
    before = case.route(logits, token_ids=ids).plan
    for t in range(S - 1):
        new = random_logits(seed=t + 1) * 3
        changed = np.concatenate([logits[:, : t + 1], new[:, t + 1 :]], axis=1)
        new_ids = np.where(np.arange(S) > t, (ids + 5) % 11, ids)
        after = case.route(changed, token_ids=new_ids).plan
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x[:, : t + 1], y[:, : t + 1])


@pytest.mark.parametrize("case", [c for c in BY_LOGITS if c.smooth], ids=str)
def test_gradient_equals_finite_differences_and_is_not_zero(case):
    h, weight = 1e-5, np.random.default_rng(1).normal(size=(1, 3, E))
    with jax.enable_x64(True):
        logits = np.asarray(random_logits((1, 3, E), seed=2), np.float64)
        state = case.state(E)

        def losses(x):
            plan = case.route(x, state=state).plan
            hits = jax.nn.one_hot(plan.expert, E) * plan.gate[..., None]
            return (hits.sum(axis=2) * weight).sum(axis=(1, 2))

        gradient = jax.grad(lambda x: losses(x).sum())(jnp.asarray(logits))
        steps = h * np.eye(logits.size).reshape(-1, 3, E)  # one moved logit in each row
        numeric = (losses(jnp.asarray(logits + steps)) - losses(jnp.asarray(logits - steps))) / (
            2 * h
        )
    np.testing.assert_allclose(gradient.ravel(), numeric, rtol=1e-3, atol=1e-8)
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("case", [c for c in BY_LOGITS if not c.router.learned], ids=str)
def test_a_router_that_learns_nothing_gives_no_gradient(case):
    def loss(x):
        routing = case.route(x)
        return routing.plan.gate.sum() + (routing.probs**2).sum() + (routing.logits**2).sum()

    assert not np.asarray(jax.grad(loss)(jnp.asarray(random_logits()))).any()


@every_router
def test_state_gets_no_gradient(case):
    state = {k: v for k, v in case.state(E).items() if jnp.issubdtype(v.dtype, jnp.floating)}
    if state:
        logits = jnp.asarray(random_logits())
        loss = lambda s: case.route(logits, state=s).plan.gate.sum()  # noqa: E731
        assert not any(np.asarray(g).any() for g in jax.tree.leaves(jax.grad(loss)(state)))


@every_router
def test_same_key_same_choices_and_other_key_only_if_declared(case):
    a, b, c = (case.route(random_logits(), seed=seed).plan for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.expert, b.expert)
    np.testing.assert_array_equal(a.gate, b.gate)
    same = bool((a.expert == c.expert).all() and (a.valid == c.valid).all())
    assert same is not case.draws


@every_router
def test_padding_takes_no_choice_and_adds_nothing(case):
    logits = random_logits()
    valid = np.arange(S) < np.array([[S], [2], [0]])
    routing = case.route(logits, valid)
    assert not routing.plan.valid[~valid].any()
    if case.fixed:
        assert routing.plan.valid[valid].all()
    assert not np.asarray(routing.plan.gate)[~valid].any()
    assert int(routing.plan.expert.min()) >= 0

    poisoned = routing._replace(
        logits=np.where(valid[..., None], routing.logits, np.float32(np.nan)),
        probs=np.where(valid[..., None], routing.probs, np.float32(np.inf)),
    )
    report = report_of(poisoned, valid, kept=np.ones_like(routing.plan.valid))
    cut = jax.tree.map(lambda x: x[1:2, :2], case.route(logits, valid))
    alone = report_of(cut, np.ones((1, 2), bool))
    for field, whole, part in zip(report._fields, report, alone, strict=True):
        if field.startswith("row_"):
            for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
                np.testing.assert_allclose(x[1], y[0], rtol=1e-5, err_msg=field)
                assert not np.asarray(x[2]).any(), field
    assert (report.expert[~valid] == -1).all()
    assert np.isfinite(report.logit_max)


@every_router
def test_requested_choices_are_k_for_each_token(case):
    valid = np.arange(S) < np.array([[S], [2], [4]])
    routing = case.route(random_logits(), valid)
    report = report_of(routing, valid)
    if case.fixed:
        np.testing.assert_array_equal(report.row_requested.sum(-1), case.k * np.array([S, 2, 4]))
    np.testing.assert_array_equal(report.row_requested.sum(-1), routing.plan.valid.sum((1, 2)))
    np.testing.assert_array_equal(report.row_requested, report.row_kept)


@pytest.mark.parametrize(
    "case",
    [c for c in BY_LOGITS if c.router.learned and c.name != "position_weighted"],  # reads none
    ids=str,
)
def test_shifting_a_tokens_logits_changes_nothing_for_softmax_only(case):
    logits = random_logits()
    shift = random_logits((B, S, 1), seed=3)
    a, b = case.route(logits), case.route(logits + shift)
    if case.softmax:
        np.testing.assert_array_equal(a.plan.expert, b.plan.expert)
        np.testing.assert_allclose(a.plan.gate, b.plan.gate, rtol=1e-5)
        np.testing.assert_allclose(a.probs, b.probs, rtol=1e-5)
    else:
        assert np.abs(a.probs - b.probs).max() > 1e-3
    lse = [report_of(r, np.ones((B, S), bool)).row_lse_squared for r in (a, b)]
    assert np.abs(lse[0] - lse[1]).min() > 1e-2


@every_router
def test_jit_changes_nothing(case):
    logits = random_logits()
    a, b = (case.route(logits, compiled=c).plan for c in (False, True))
    np.testing.assert_array_equal(a.expert, b.expert)
    np.testing.assert_allclose(a.gate, b.gate, rtol=1e-6)


@every_router
def test_state_update_keeps_shapes_types_and_layers_apart(case):
    state, update = case.state(E), case.router.update_state
    counts = np.random.default_rng(0).integers(0, 50, (2, E), np.int32)
    report = report_of(case.route(random_logits()), np.ones((B, S), bool))
    stats = {name: np.stack([v.sum(0), 2 * v.sum(0)]) for name, v in report.row_terms.items()}
    facts = {"counts": counts, "tokens": np.array([50, 50]), "stats": stats}
    facts = jax.tree.map(jnp.asarray, pick_inputs(update, facts))
    shared = pick_inputs(update, {"cost": jnp.float32(2.0)})
    first = jax.tree.map(lambda x: x[0], facts)
    new = update(jax.tree.map(jnp.asarray, state), **first, **shared)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    stacked = jax.tree.map(lambda x: jnp.asarray(np.stack([x, 2 * x])), state)
    both = update(stacked, **facts, **shared)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y), both, new)
    assert bool(state) is case.router.stateful
