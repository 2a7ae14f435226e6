import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import ConfigError
from moe.routing import top_p
from tests.routing.cases import GOLDEN_LOGITS, random_logits
from tests.routing.direct import routed

LOGITS = random_logits((2, 32, 8))
PROBS = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum(-1, keepdims=True)
MASSES = (1e-6, 0.2, 0.4, 0.7, 0.95, 1.0)


def plan(mass, logits=LOGITS, **options):
    return routed(top_p.route, logits, inputs={"mass": np.float32(mass)}, k=2, **options).plan


def test_choices_worked_out_by_hand():
    # The first token's probabilities are 0.6439, 0.2369, 0.0871, 0.0321.
    for mass, k in ((0.4, 1), (0.64, 1), (0.65, 2), (0.9, 3), (0.97, 4)):
        first = plan(mass, GOLDEN_LOGITS)
        assert first.valid[0, 0].sum() == k
        np.testing.assert_allclose(
            first.gate[0, 0], [0.6439, 0.2369, 0.0871, 0.0321] * (np.arange(4) < k), atol=5e-5
        )


@pytest.mark.parametrize("mass", MASSES[1:-1])
def test_choices_are_the_shortest_prefix_that_reaches_the_mass(mass):
    chosen = plan(mass)
    np.testing.assert_array_equal(chosen.expert, np.argsort(-PROBS, axis=-1))
    best = np.sort(PROBS, axis=-1)[..., ::-1]
    gathered = np.where(chosen.valid, best, 0).sum(-1)
    last = np.where(chosen.valid, best, 1).min(-1)
    assert (gathered >= mass).all()
    assert (gathered - last < mass).all()
    np.testing.assert_allclose(chosen.gate, np.where(chosen.valid, best, 0), rtol=1e-5)


def test_almost_no_mass_is_one_expert_and_all_mass_is_all_experts():
    assert (plan(1e-6).valid.sum(-1) == 1).all()
    assert plan(1.0).valid.all()
    assert plan(1.0, LOGITS * np.float32(1e4)).valid.all()  # all but one probability underflow


def test_more_mass_never_means_fewer_experts():
    counts = np.stack([plan(mass).valid.sum(-1) for mass in np.linspace(0.01, 1.0, 34)])
    assert (np.diff(counts, axis=0) >= 0).all()
    assert len(np.unique(counts)) == 8


def test_the_bound_keeps_the_most_probable():
    free, bound = plan(0.95), plan(0.95, k_max=3)
    assert bound.expert.shape[-1] == 3
    np.testing.assert_array_equal(bound.expert, free.expert[..., :3])
    np.testing.assert_array_equal(bound.valid.sum(-1), np.minimum(free.valid.sum(-1), 3))


def test_padding_has_no_expert():
    valid = np.arange(32) < np.array([[32], [5]])
    routing = routed(top_p.route, LOGITS, valid, k=2)
    np.testing.assert_array_equal(routing.plan.valid.any(-1), valid)
    np.testing.assert_array_equal(routing.plan.gate.any(-1), valid)


def test_active_counts_experts_and_its_gradient_makes_them_fewer():
    def active(logits):
        return top_p.route(logits, jnp.ones((2, 32), bool), k=2, mass=0.8).terms["active"]

    value, gradient = jax.jit(jax.value_and_grad(lambda x: active(x).sum()))(jnp.asarray(LOGITS))
    before = plan(0.8).valid.sum(-1)
    assert value == before.sum()
    after = plan(0.8, LOGITS - np.asarray(gradient)).valid.sum(-1)
    assert after.sum() < 0.8 * before.sum()
    # One step of the entropy's own gradient, scaled by exp(entropy).
    entropy = -(PROBS * np.log(PROBS)).sum(-1, keepdims=True)
    expected = -np.exp(entropy) * PROBS * (np.log(PROBS) + entropy)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_gradient_is_finite_where_probabilities_underflow():
    def loss(logits):
        routing = top_p.route(logits, jnp.ones((2, 32), bool), k=2)
        return routing.terms["active"].sum() + routing.plan.gate.sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(jnp.asarray(LOGITS) * 1e4)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 0.0}, r"mass=0\.0 must be above 0"),
        ({"mass": 1.1}, r"mass=1\.1 .* at most 1"),
        ({"k_max": 9}, r"k_max=9 must be between 1 and model\.num_experts=8"),
        ({"k_max": -1}, "k_max=-1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        top_p.check(8, k=2, **options)
