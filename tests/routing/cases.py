"""What the routing tests share: every router under every option that changes what it does."""

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

    def state(self, num_experts: int, seed: int = 5) -> State:
        """State as after some training: a bias that is not zero, a table with ids of its own."""
        key = jax.random.key(seed)
        counts = np.arange(VOCAB) ** 2
        options = pick_options(self.router.init_state, self.options)
        state = self.router.init_state(num_experts, VOCAB, self.k, key, counts, **options)
        if "bias" in state:
            state["bias"] = 0.3 * jax.random.normal(key, state["bias"].shape)
        return state

    def route(self, logits, valid=None, *, state=None, token_ids=None, seed=9) -> Routing:
        logits = jnp.asarray(logits)
        B, S, E = logits.shape
        valid = jnp.ones((B, S), bool) if valid is None else jnp.asarray(valid)
        if token_ids is None:
            token_ids = (np.arange(S) * 3 + np.arange(B)[:, None]) % VOCAB
        return self.router.route(
            logits,
            valid,
            k=self.k,
            key=jax.random.key(seed) if self.router.needs_key_in_eval else None,
            state=self.state(E) if state is None else state,
            token_ids=jnp.asarray(token_ids, jnp.int32) if self.router.needs_token_ids else None,
            **pick_options(self.router.route, self.options),
        )

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items()), f"k={self.k}"])


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


def stacked_report(routing: Routing, valid, kept=None) -> LayerReport:
    """The report of a model with one sparse layer."""
    valid = jnp.asarray(valid)
    report = layer_report(routing, routing.plan.valid if kept is None else kept, valid)
    return jax.tree.map(lambda x: x[None], report)
