"""Experts inside the attention: each token chooses its heads.

| module | expert | keys and values |
|---|---|---|
| `ProjectionExperts` | a query and an output projection | one head, shared by all experts |
| `RoutedHeads` | a head of ordinary attention | those of ordinary attention |

`ProjectionExperts` is MoA (Zhang et al. 2022, arXiv:2210.05144), `RoutedHeads` is MoH (Jin et al. 2024,
arXiv:2410.11842).

In both, `y_t = sum_i g_i W_o^i Att(x_t W_q^i, K, V)` over the heads `i` that token `t` chose. The cache
of keys and values does not grow with the number of experts. Choices are C0 with a C0 router, and
attention is causal inside documents unless the model need not be.

The report of a layer's heads never joins those of the sparse layers, whose experts are others; the
term `head_balance` is what a loss can read of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.errors import ConfigError
from moe.model.attention import Attention, Heads, KeyValues, attend
from moe.model.attention_types import AttentionOutput
from moe.model.experts import fan_in_init
from moe.routing import topk
from moe.routing.gates import LinearGate, project
from moe.routing.report import layer_report
from moe.routing.selection import ROUTING_NAME
from moe.routing.types import Choices, LayerReport, Routing

HEAD_BALANCE = "head_balance"  # name of the term

Route = Callable[..., Routing]
"""`route(logits [B S E], valid [B S], *, k) -> Routing` with `Choices` for its plan."""

ROUTE_BY_PROBABILITY: Route = partial(topk.route, normalize="none")


class ProjectionExperts(nnx.Module):
    """Mixture of attention heads: `E` pairs of query and output projection over one shared K, V.

    Queries and outputs of all `E` experts are projected, as products of dense matrices; attention,
    whose cost grows with the length, runs for the `k` chosen heads only. Differs from the paper in
    that the gradient also flows through the normalisation of the gates.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        head_dim: int,
        *,
        k: int,
        qk_norm: str,
        rope_base: float,
        norm_eps: float,
        out_scale: float,
        route: Route = topk.route,
        causal: bool = True,
        rngs: nnx.Rngs,
    ):
        """`k` heads a token out of `num_experts`, chosen by `route`; the rest as for `Attention`."""
        self.k, self.router = k, route
        self.full = Attention(
            width,
            num_experts,
            1,
            head_dim,
            qk_norm=qk_norm,
            rope_base=rope_base,
            norm_eps=norm_eps,
            out_scale=out_scale,
            causal=causal,
            rngs=rngs,
        )
        self.gate = LinearGate(width, num_experts, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        cache: KeyValues | None = None,
        start: Int[Array, ""] | None = None,
    ) -> AttentionOutput:
        """Attends with the chosen heads, arguments as for `Attention`; reports the choices."""
        valid = segments > 0
        routing, plan = _decide(self.router, self.gate(x).logits, valid, self.k)
        heads = self.full.heads(x)
        chosen = jax.nn.one_hot(plan.expert, heads.query.shape[2], dtype=x.dtype)  # [B S K E]
        query = jnp.einsum("bske,bsex->bskx", chosen, heads.query)
        heads = self.full.rotated(Heads(query, heads.key, heads.value), positions)
        out, cache = attend(heads, segments, cache, start, causal=self.full.causal)
        out = out * _gates(plan)[..., None].astype(x.dtype)
        y = self.full.merged(jnp.einsum("bske,bskx->bsex", chosen, out))
        report = layer_report(routing, plan.valid, valid)
        return AttentionOutput(y, cache, report, {HEAD_BALANCE: balance_term(report, valid)})


class RoutedHeads(nnx.Module):
    """Ordinary attention whose heads are weighted token by token: shared ones, and the `k` chosen.

    With `[a, b] = softmax(x W_h)`, a shared head has gate `a softmax(x W_s)_i` and a chosen one of the
    others `b softmax(x W_r)_i`; without shared heads `b = 1`. All heads are computed.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        k: int,
        shared: int,
        qk_norm: str,
        rope_base: float,
        norm_eps: float,
        out_scale: float,
        route: Route = ROUTE_BY_PROBABILITY,
        causal: bool = True,
        rngs: nnx.Rngs,
    ):
        """The first `shared` heads are always on, and `k` of the others by `route`; else as `Attention`."""
        self.k, self.shared, self.router = k, shared, route
        self.full = Attention(
            width,
            heads,
            kv_heads,
            head_dim,
            qk_norm=qk_norm,
            rope_base=rope_base,
            norm_eps=norm_eps,
            out_scale=out_scale,
            causal=causal,
            rngs=rngs,
        )
        self.gate = LinearGate(width, heads - shared, rngs=rngs)
        if shared:
            init = fan_in_init(width)
            self.shared_gate = nnx.Param(init(rngs.params(), (width, shared)), axes=("D", None))
            self.balance = nnx.Param(init(rngs.params(), (width, 2)), axes=("D", None))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        cache: KeyValues | None = None,
        start: Int[Array, ""] | None = None,
    ) -> AttentionOutput:
        """Attends with weighted heads, arguments as for `Attention`; reports choices of routed heads."""
        valid = segments > 0
        routing, plan = _decide(self.router, self.gate(x).logits, valid, self.k)
        routed = self.full.wq.shape[1] - self.shared
        chosen = jax.nn.one_hot(plan.expert, routed)  # [B S K E]
        weight = jnp.einsum("bsk,bske->bse", _gates(plan), chosen)
        if self.shared:
            balance = jax.nn.softmax(project(x, self.balance[...]))  # [B S 2]
            always = jax.nn.softmax(project(x, self.shared_gate[...]))
            parts = [balance[..., :1] * always, balance[..., 1:] * weight]
            weight = jnp.concatenate(parts, axis=-1)
        heads = self.full.rotated(self.full.heads(x), positions)
        out, cache = attend(heads, segments, cache, start, causal=self.full.causal)
        y = self.full.merged(out * weight[..., None].astype(x.dtype))
        report = layer_report(routing, plan.valid, valid)
        return AttentionOutput(y, cache, report, {HEAD_BALANCE: balance_term(report, valid)})


def _decide(route: Route, logits: Array, valid: Array, k: int) -> tuple[Routing, Choices]:
    routing = route(logits, valid, k=k)
    if not isinstance(routing.plan, Choices):
        raise ConfigError(
            f"The router of attention heads returned {type(routing.plan).__name__}: heads are chosen "
            "by tokens. Use a router whose plan is Choices, such as topk."
        )
    plan = checkpoint_name(routing.plan, ROUTING_NAME)
    return routing._replace(plan=plan), plan


def _gates(plan: Choices) -> Float[Array, "B S K"]:
    return jnp.where(plan.valid, plan.gate, 0.0)


def check(*, heads: int, k: int, shared: int = 0, qk_norm: str = "none") -> None:
    """Refuses numbers of heads that cannot be.

    Raises:
      ConfigError: `k` or `shared` does not fit into `heads`, or queries are normalised together.
    """
    if shared < 0 or not 1 <= k <= heads - shared:
        raise ConfigError(
            f"k={k} with heads={heads} and shared={shared}: a token chooses between 1 and heads - "
            f"shared = {heads - shared} of the heads that are not shared. Change k or shared."
        )
    if qk_norm == "full":
        raise ConfigError(
            "qk_norm='full' with experts for heads: it normalises the queries of all heads at once, "
            "so a chosen head would depend on the others. Use qk_norm='head' or 'none'."
        )


def balance_term(report: LayerReport, valid: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """The balance loss of each row's heads, `E sum_i f_i P_i`, at each of its real tokens; 0 at padding.

    With f_i the share of choices of head i and P_i its mean probability in the row; 1 when balanced.
    Zhang et al. 2022 take the same product over the batch.
    """
    choices = jnp.maximum(report.row_requested.sum(axis=-1, keepdims=True), 1.0)
    tokens = jnp.maximum(report.row_tokens, 1.0)[:, None]
    product = jax.lax.stop_gradient(report.row_requested / choices) * report.row_probs / tokens
    row = product.shape[-1] * product.sum(axis=-1, keepdims=True)
    return jnp.where(valid, row, 0.0)


def projection_experts(
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    experts: int = 8,
    top_k: int = 2,
    **common: Any,
) -> ProjectionExperts:
    """`ProjectionExperts` by the names of the config: `model.heads` and `model.kv_heads` are not read."""
    del heads, kv_heads
    return ProjectionExperts(width, experts, head_dim, k=top_k, **common)


def routed_heads(
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    top_k: int = 2,
    shared_heads: int = 1,
    **common: Any,
) -> RoutedHeads:
    """`RoutedHeads` by the names of the config: `top_k` of the `heads - shared_heads` that are chosen."""
    return RoutedHeads(width, heads, kv_heads, head_dim, k=top_k, shared=shared_heads, **common)


def check_projections(*, experts: int, top_k: int, qk_norm: str = "none") -> None:
    """Raises ConfigError as `check`, for `projection_experts`."""
    check(heads=experts, k=top_k, qk_norm=qk_norm)


def check_routed(*, heads: int, top_k: int, shared_heads: int, qk_norm: str = "none") -> None:
    """Raises ConfigError as `check`, for `routed_heads`."""
    check(heads=heads, k=top_k, shared=shared_heads, qk_norm=qk_norm)


def one_head_cache(batch: int, length: int, *, head_dim: int, dtype: jnp.dtype) -> KeyValues:
    """An empty cache of the one head of keys and values that projection experts share."""
    zeros = jnp.zeros((batch, length, 1, head_dim), dtype)
    return KeyValues(zeros, zeros)
