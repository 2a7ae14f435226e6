"""What the routing tests share: every router under every option that changes what it does."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from moe.routing.report import layer_report
from moe.routing.table import ROUTERS, Router, pick_options
from moe.routing.types import Choices, LayerReport, Routing, State

VOCAB = 11

# Eight tokens, four experts; the numbers worked out from them in float64 are quoted in the tests.
GOLDEN_LOGITS = np.array(
    [
        [2, 1, 0, -1],
        [1.5, 0.5, 1, -0.5],
        [2.5, 0, -1, 0.5],
        [0, 2, 1, 0.5],
        [1, 0, 2, -1],
        [1.2, 1, 0.8, 0.6],
        [0.3, 0.2, 0.1, 1.4],
        [2.2, 1.9, 0.1, 0],
    ],
    np.float32,
)[None]
GOLDEN_VALID = np.ones((1, 8), bool)


class Case(NamedTuple):
    name: str
    k: int
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    softmax: bool = True  # probs and gates do not see a shift of a token's logits
    gate_sum: float | None = 1.0  # None: not fixed

    @property
    def router(self) -> Router:
        return ROUTERS[self.name]

    def state(self, num_experts: int) -> State:
        """State as after some training: a bias that is not zero, a table with ids of its own."""
        return dict(_state(self, num_experts))

    # NumPy logits give a NumPy routing: assertions on it then compile nothing.
    def route(
        self, logits, valid=None, *, state=None, token_ids=None, seed=9, compiled=True
    ) -> Routing:
        B, S, E = logits.shape
        if token_ids is None:
            token_ids = (np.arange(S) * 3 + np.arange(B)[:, None]) % VOCAB
        route = _compiled(self) if compiled else functools.partial(_route, self)
        routing = route(
            jnp.asarray(logits),
            jnp.asarray(np.ones((B, S), bool) if valid is None else valid),
            jax.random.key(seed) if self.router.needs_key_in_eval else None,
            jax.tree.map(jnp.asarray, self.state(E) if state is None else state),
            jnp.asarray(token_ids, jnp.int32) if self.router.needs_token_ids else None,
        )
        return jax.device_get(routing) if isinstance(logits, np.ndarray) else routing

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items()), f"k={self.k}"])


def _route(case, logits, valid, key, state, token_ids) -> Routing:
    options = pick_options(case.router.route, case.options)
    return case.router.route(
        logits, valid, k=case.k, key=key, state=state, token_ids=token_ids, **options
    )


@functools.cache
def _compiled(case):
    return jax.jit(functools.partial(_route, case))


@functools.cache
def _state(case, num_experts) -> State:
    key = jax.random.key(5)
    options = pick_options(case.router.init_state, case.options)
    counts = np.arange(VOCAB) ** 2
    state = case.router.init_state(num_experts, VOCAB, case.k, key, counts, **options)
    if "bias" in state:
        state["bias"] = 0.3 * jax.random.normal(key, state["bias"].shape)
    return jax.device_get(state)


DEEPSEEK = {"groups": 4, "groups_kept": 2, "scale": 2.5}
CASES = [
    Case("switch", 1, gate_sum=None),
    Case("topk", 2, {"normalize": "none"}, gate_sum=None),
    Case("topk", 3, {"normalize": "renormalize"}),
    Case("topk", 3, {"normalize": "topk_softmax"}),
    Case("deepseek_v3", 3, DEEPSEEK, softmax=False, gate_sum=2.5),
    Case("deepseek_v3", 1, {"scale": 2.0}, softmax=False, gate_sum=None),
    Case("random", 2),
    Case("hash", 2, {"kind": "random"}),
    Case("hash", 1, {"kind": "balanced"}),
]


def random_logits(shape=(3, 6, 8), seed=0) -> np.ndarray:
    """Logits without ties."""
    return 2.0 * np.random.default_rng(seed).standard_normal(shape, np.float32)


def one_choice(probs, expert) -> Routing:
    """A decision of one choice a token, in NumPy, with these probabilities."""
    probs, expert = np.asarray(probs, np.float32), np.asarray(expert, np.int32)[..., None]
    ones: Any = np.ones(expert.shape, np.float32)
    zeros: Any = np.zeros_like(probs)
    return Routing(zeros, cast(Any, probs), Choices(cast(Any, expert), ones, ones > 0))


_report = jax.jit(layer_report)


def report_of(routing: Routing, valid, kept=None) -> LayerReport:
    """The report of one layer, in NumPy."""
    arrays = (routing, routing.plan.valid if kept is None else kept, valid)
    return jax.device_get(_report(*jax.tree.map(jnp.asarray, arrays)))


def stacked_report(routing: Routing, valid, kept=None) -> LayerReport:
    """The report of a model with one sparse layer."""
    return jax.tree.map(lambda x: x[None], report_of(routing, valid, kept))
