"""What the routing tests share: every router under every option that changes what it does."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from moe.routing.report import layer_report
from moe.routing.router import INPUTS, Router, parameters_of, pick_inputs, pick_options
from moe.routing.table import ROUTERS
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
    gate_sum: float | str | None = 1.0  # "largest": of the k largest probs; None: not fixed
    training: bool = False  # decide as in training, with a key
    inputs: Callable[[Array], dict[str, Array]] | None = None  # the gate's own inputs, of logits
    estimates: bool = False  # gradients are estimates, not those of what was computed
    variable: bool = False  # another number of choices than k, or not for every token

    @property
    def router(self) -> Router:
        return ROUTERS[self.name]

    @property
    def draws(self) -> bool:
        """Whether the decision depends on a key."""
        return self.router.needs_key_in_eval or (self.training and "key" in self._named)

    @property
    def fixed(self) -> bool:
        """Whether every token has exactly k choices."""
        return self.router.fixed_k and not self.variable

    @property
    def causal(self) -> bool:
        """Whether a token's choice must not depend on later ones."""
        router = self.router
        return router.causality != "C3" or (router.causal_in_eval and not self.training)

    @property
    def tokenwise(self) -> bool:
        """Whether a token's choice is its own affair, wherever it stands."""
        named = set(self._named) & {"positions", "modality"}
        return self.router.causality == "C0" and not self.draws and not named

    @property
    def permutes(self) -> bool:
        """Whether renumbering experts must renumber choices; noise has numbers of its own."""
        return self.router.learned and self.router.permutes_experts and not self.draws

    @property
    def smooth(self) -> bool:
        """Whether gradients of gates are their derivatives."""
        return self.router.learned and not self.draws and not self.estimates

    @property
    def by_logits(self) -> bool:
        """Whether the gate hands the router nothing but logits, or this case knows the rest."""
        given = INPUTS | set(self.inputs(jnp.zeros((1, 1, 4))) if self.inputs else ())
        needed = {n for n, p in self._named.items() if p.default is p.empty}
        return needed <= given and self.router.plan == "choices"

    @property
    def _named(self) -> dict[str, Any]:
        return parameters_of(self.router.route)

    def state(self, num_experts: int) -> State:
        """State as after some training: a bias that is not zero, a table with ids of its own."""
        return dict(_state(self, num_experts))

    # NumPy logits give a NumPy routing: assertions on it then compile nothing.
    def route(
        self,
        logits,
        valid=None,
        *,
        state=None,
        token_ids=None,
        documents=None,
        seed=9,
        compiled=True,
    ) -> Routing:
        B, S, E = logits.shape
        valid = np.ones((B, S), bool) if valid is None else np.asarray(valid)
        if token_ids is None:
            token_ids = (np.arange(S) * 3 + np.arange(B)[:, None]) % VOCAB
        documents = valid.astype(np.int32) if documents is None else documents
        inputs = {
            "valid": valid,
            "state": self.state(E) if state is None else state,
            "token_ids": np.asarray(token_ids, np.int32),
            "positions": np.broadcast_to(np.arange(S, dtype=np.int32), (B, S)),
            "documents": np.asarray(documents, np.int32),
            "modality": np.broadcast_to(np.arange(S, dtype=np.int32) % 2, (B, S)),
        }
        inputs = jax.tree.map(jnp.asarray, inputs)
        if self.draws:
            inputs["key"] = jax.random.key(seed)
        route = _compiled(self) if compiled else functools.partial(_route, self)
        routing = route(jnp.asarray(logits), inputs)
        return jax.device_get(routing) if isinstance(logits, np.ndarray) else routing

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        options = (f"{name}={value}" for name, value in self.options.items())
        form = ["training"] if self.training else []
        return "-".join([self.name, *options, f"k={self.k}", *form])


def _route(case, logits, inputs) -> Routing:
    inputs = {**inputs, "training": case.training, "tokens": logits}
    if case.inputs is not None:
        inputs |= case.inputs(logits)
    route = case.router.route
    named = pick_inputs(route, inputs) | pick_options(route, case.options)
    return route(logits, k=case.k, **named)


@functools.cache
def _compiled(case):
    return jax.jit(functools.partial(_route, case))


@functools.cache
def _state(case, num_experts) -> State:
    key, make = jax.random.key(5), case.router.init_state
    facts = {"num_experts": num_experts, "vocab_size": VOCAB, "k": case.k, "key": key}
    facts |= {"token_counts": np.arange(VOCAB) ** 2, "width": num_experts}
    state = make(**pick_inputs(make, facts), **pick_options(make, case.options))
    for name in {"bias", "beta"} & set(state):
        state[name] = 0.3 * jax.random.normal(key, state[name].shape)
    return jax.device_get(state)


DEEPSEEK = {"groups": 4, "groups_kept": 2, "scale": 2.5}


def noise_scale(logits):
    return {"noise_scale": 0.5 + jax.nn.softmax(logits)}


def _cosine(logits):
    return {"cosine": jnp.tanh(logits)}


def _foreseen(logits):
    return {"foreseen": logits[..., 0]}


def _thresholds(logits):
    return {"thresholds": jnp.zeros(logits.shape[-1])}


def _group_logits(logits):
    grouped = logits.reshape(*logits.shape[:2], 4, -1)
    return {"group_logits": jax.nn.logsumexp(grouped, axis=-1)}


CASES = [
    Case("switch", 1, gate_sum="largest"),
    Case("gshard", 2),
    Case("gshard", 2, gate_sum=None, training=True),
    Case("noisy_topk", 3, {"init": "normal"}, inputs=noise_scale),
    Case("noisy_topk", 3, {"init": "normal"}, inputs=noise_scale, training=True),
    Case("topk", 2, {"normalize": "none"}, gate_sum="largest"),
    Case("topk", 3, {"normalize": "renormalize"}),
    Case("topk", 3, {"normalize": "topk_softmax"}),
    Case("deepseek_v2", 3, {**DEEPSEEK, "scale": 16.0}, gate_sum=None),
    Case("topk", 3, {"score": "sqrt_softplus", "scale": 2.5}, softmax=False, gate_sum=2.5),
    Case("noisy_topk", 2, {"normalize": "none"}, gate_sum=None, inputs=noise_scale),
    Case("quantile", 3, {"score": "sigmoid"}, softmax=False, training=True),
    Case("deepseek_v3", 3, DEEPSEEK, softmax=False, gate_sum=2.5),
    Case("deepseek_v3", 1, {"scale": 2.0}, softmax=False, gate_sum=None),
    Case("quantile", 2),
    Case("top_p", 3, {"mass": 0.6, "k_max": 5}, gate_sum=None),
    Case("dynmoe", 3, gate_sum=None, softmax=False, inputs=_thresholds, estimates=True),
    Case("relu", 3, gate_sum=None, softmax=False),
    Case("dselect_k", 2),
    Case("cosine", 2, gate_sum=None, softmax=False, inputs=_cosine),
    Case("query_key", 2, {"heads": 2}),
    Case("expert_attention", 2),
    Case("product_key", 4, {"heads": 2}, gate_sum=2.0),
    Case("residual", 2),
    Case("recurrent", 2, {"memory_width": 4}),
    Case("expert_choice", 2, gate_sum=None),
    Case("expert_choice", 2, gate_sum=None, training=True),
    Case("base", 1, gate_sum=None, softmax=False),
    Case("base", 1, gate_sum=None, softmax=False, training=True),
    Case("sinkhorn", 2, gate_sum=None),
    Case("sinkhorn", 2, gate_sum=None, training=True),
    Case("hash", 2, {"kind": "random"}),
    Case("hash", 1, {"kind": "balanced"}),
    Case("bigram_hash", 2),
    Case("position", 2),
    Case("position_weighted", 2, gate_sum=None, softmax=False),
    Case("random", 2),
    Case("thor", 1, {"scope": "token"}, training=True),
    Case("smoe_dropout", 2, gate_sum=None),
    Case("gumbel", 2, gate_sum=None, training=True),
    Case("gumbel", 2, {"gates": "renormalize"}, training=True),
    Case("gumbel_sampled", 2, {"gates": "raw"}, gate_sum=None),
    Case("reinforce", 1, inputs=_foreseen, training=True),
    Case("bernoulli", 2, gate_sum=None, softmax=False, inputs=_foreseen, training=True),
    Case("random_path", 2, {"paths": 2}, gate_sum=None, training=True),
    Case("random_path_sampled", 2, {"paths": 2}, gate_sum=None),
    Case("noisy_weights", 2, training=True),
    Case("prior", 2),
    Case("soft_moe", 2, gate_sum=None),
    Case("smear", 1, gate_sum=None),
    Case("smear", 1, gate_sum=None, training=True),
    Case("lory", 1, {"segment": 4}, gate_sum=None),
    Case("two_level", 4, {"groups": 4, "groups_kept": 2}, inputs=_group_logits),
    Case("balanced_groups", 4, {"groups": 2, "normalize": "renormalize"}),
    Case("segment", 2, {"segment_size": 2}),
    Case("segment_self", 2, {"segment_size": 2}),
    Case("document_pool", 2, {"pool_size": 4, "segment_size": 2}),
    Case("document_pool_whole", 2, {"pool_size": 4}),
    Case("modality_pools", 2, {"pools": (4, 3), "pool_shared": 1}),
]
# Those whose decision is a function of logits alone, or of what can be made of logits here.
BY_LOGITS = [case for case in CASES if case.by_logits]


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
