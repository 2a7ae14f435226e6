"""The sparse layer: gate, router, dispatch, experts, combine."""

from functools import partial
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped
import numpy as np

from moe.dispatch.types import Dispatch
from moe.model.experts import MLP, Experts, feed_forward
from moe.routing.gates import LinearGate
from moe.routing.report import layer_report
from moe.routing.selection import ROUTING_NAME
from moe.routing.table import ROUTERS, pick_options
from moe.routing.types import LayerReport, Routing


class RouterState(nnx.Variable):
    """Biases, tables and other state of a router: no gradient, updated once per optimiser step."""


class RouterSpec(NamedTuple):
    """What a sparse layer needs to know of its router: the name and the static options of `route`."""

    name: str
    k: int
    options: tuple[tuple[str, Any], ...]  # the router's own options, hashable
    token_counts: tuple[int, ...] | None = None  # how often each token id occurs, for hash tables


class Call(NamedTuple):
    """What one forward pass is told, beside the activations."""

    tokens: Int[Array, "B S"]
    valid: Bool[Array, "B S"]
    dispatch: Dispatch
    jitter: Float[Array, ""] | float | None = None  # input noise of the gate, relative; None: none
    dropout: Float[Array, ""] | float | None = None  # rate; None in evaluation
    key: Key[Array, ""] | None = None  # noise of this pass; None where nothing is drawn


class SparseMLP(nnx.Module):
    """`E` experts behind a router, and optional shared experts that every token visits."""

    def __init__(
        self,
        spec: RouterSpec,
        *,
        num_experts: int,
        width: int,
        hidden: int,
        shared_experts: int,
        vocab_size: int,
        activation: str,
        out_scale: float,
        rngs: nnx.Rngs,
    ):
        """`shared_experts` of the same width are kept as one dense MLP with gate 1 (DeepSeekMoE)."""
        row = ROUTERS[spec.name]
        self.spec, self.activation = spec, activation
        if row.learned:
            self.gate = LinearGate(width, num_experts, rngs=rngs)
        self.num_experts = num_experts
        self.experts = Experts(
            num_experts, width, hidden, activation, out_scale=out_scale, rngs=rngs
        )
        if shared_experts:
            self.shared = MLP(
                width, shared_experts * hidden, activation, out_scale=out_scale, rngs=rngs
            )
        if row.stateful:
            counts = None if spec.token_counts is None else np.asarray(spec.token_counts)
            state = row.init_state(
                num_experts=num_experts,
                vocab_size=vocab_size,
                k=spec.k,
                key=rngs.params(),
                token_counts=counts,
                **pick_options(row.init_state, dict(spec.options)),
            )
            self.state = nnx.Dict({name: RouterState(value) for name, value in state.items()})

    def route(self, x: Float[Array, "B S D"], call: Call, key: Shaped[Array, ""] | None) -> Routing:
        """Asks the gate and the router; no expert runs."""
        row = ROUTERS[self.spec.name]
        gate_key, route_key = (None, None) if key is None else jax.random.split(key)
        if row.learned:
            noise: dict[str, Any] = (
                {} if call.jitter is None else {"jitter": call.jitter, "key": gate_key}
            )
            logits = self.gate(x, **noise)
        else:
            logits = jnp.zeros((*x.shape[:2], self.num_experts), jnp.float32)
        state = {k: v[...] for k, v in self.state.items()} if row.stateful else None
        routing = row.route(
            logits,
            call.valid,
            k=self.spec.k,
            key=route_key,
            state=state,
            token_ids=call.tokens if row.needs_token_ids else None,
            **pick_options(row.route, dict(self.spec.options)),
        )
        return routing._replace(plan=checkpoint_name(routing.plan, ROUTING_NAME))

    def __call__(
        self, x: Float[Array, "B S D"], call: Call, key: Shaped[Array, ""] | None
    ) -> tuple[Float[Array, "B S D"], LayerReport]:
        """Output before the residual (0 for a token with no kept choice) and the layer's report."""
        routing = self.route(x, call, key)
        expert_fn = partial(feed_forward, activation=self.activation)
        out = call.dispatch(x, routing.plan, self.experts.params(x.dtype), expert_fn)
        y = out.output.astype(x.dtype)
        if hasattr(self, "shared"):
            y = y + self.shared(x)
        return y, layer_report(routing, out.kept, call.valid)
