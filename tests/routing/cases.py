"""What the routing tests share: every router under every option that changes what it does."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.routing.report import layer_report
from moe.routing.table import ROUTERS, Router, pick_options
from moe.routing.types import LayerReport, Routing, State

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

    def route(
        self, logits, valid=None, *, state=None, token_ids=None, seed=9, compiled=True
    ) -> Routing:
        B, S, E = logits.shape
        if token_ids is None:
            token_ids = (np.arange(S) * 3 + np.arange(B)[:, None]) % VOCAB
        route = _compiled(self) if compiled else functools.partial(_route, self)
        return route(
            jnp.asarray(logits),
            jnp.ones((B, S), bool) if valid is None else jnp.asarray(valid),
            jax.random.key(seed) if self.router.needs_key_in_eval else None,
            self.state(E) if state is None else state,
            jnp.asarray(token_ids, jnp.int32) if self.router.needs_token_ids else None,
        )

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
    return state


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


def random_logits(shape=(3, 6, 8), seed=0) -> jax.Array:
    """Logits without ties."""
    return 2.0 * jax.random.normal(jax.random.key(seed), shape)


jit_report = jax.jit(layer_report)


def stacked_report(routing: Routing, valid, kept=None) -> LayerReport:
    """The report of a model with one sparse layer."""
    valid = jnp.asarray(valid)
    report = jit_report(routing, routing.plan.valid if kept is None else kept, valid)
    return jax.tree.map(lambda x: x[None], report)
