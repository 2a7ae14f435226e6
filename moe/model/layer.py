"""The sparse layer: gate, router, dispatch, experts, combine."""

from functools import partial
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped
import numpy as np

from moe.dispatch.types import Dispatch, Dispatched
from moe.model.experts import MLP, ExpertParams, Experts, feed_forward
from moe.model.mixed_experts import Kinds, MixedExperts, share_zero_gates, split_choices
from moe.model.noise import Noisy, WeightNoise
from moe.routing.gates import Gated, jittered
from moe.routing.report import layer_report
from moe.routing.router import Router, pick_inputs, pick_options
from moe.routing.selection import ROUTING_NAME
from moe.routing.table import ROUTERS
from moe.routing.types import Choices, LayerReport, Routing, Slots

WEIGHTS = 2  # folded into a key for noise on weights; 0 and 1 are noise of the decision


class RouterState(nnx.Variable):
    """Biases, tables and other state of a router: no gradient, updated once per optimiser step."""


class RouterSpec(NamedTuple):
    """What a sparse layer needs to know of its router: the name and its static options."""

    name: str
    k: int
    options: tuple[tuple[str, Any], ...]  # the router's own options, hashable
    token_counts: tuple[int, ...] | None = None  # how often each token id occurs, for hash tables

    @property
    def row(self) -> Router:
        """Its row in the table."""
        return ROUTERS[self.name]

    def picked(self, function: Any) -> dict[str, Any]:
        """The options that one function of the router takes."""
        return pick_options(function, dict(self.options))


class Call(NamedTuple):
    """What one forward pass is told, beside the activations."""

    tokens: Int[Array, "B S"]
    valid: Bool[Array, "B S"]
    dispatch: Dispatch
    jitter: Float[Array, ""] | float | None = None  # input noise of the gate, relative; None: none
    dropout: Float[Array, ""] | float | None = None  # rate; None in evaluation
    key: Key[Array, ""] | None = None  # noise of this pass; None where nothing is drawn
    training: bool = False  # whether routers decide as in training, with their noise
    positions: Int[Array, "B S"] | None = None  # in the document; None: 0, 1, ...
    documents: Int[Array, "B S"] | None = None  # packed documents, 0 padding; None: one a row
    modality: Int[Array, "B S"] | None = None  # kind of each token, from 0; None: all of one kind
    shared: Any = None  # the part of the gate that all layers share
    prefix: Bool[Array, "B S"] | None = (
        None  # seen by all of their document; None: earlier ones only
    )
    frames: Float[Array, "B N F"] | None = None  # what the stem makes the first positions of


class Sparse(NamedTuple):
    """What a sparse layer gives back."""

    output: Float[Array, "B S D"]  # before the residual; 0 for a token with no kept choice
    report: LayerReport
    memory: Any = None  # of the gate, for the next sparse layer
    history: "History | None" = None  # with these positions, where the cache keeps one


class History(NamedTuple):
    """What routers that look back have seen, in generation; what is not filled means nothing."""

    inputs: Float[Array, "B N D"]
    tokens: Int[Array, "B N"]
    modality: Int[Array, "B N"]

    def with_part(self, x: Array, call: Call, start: Int[Array, ""]) -> "History":
        """With the inputs, ids and kinds of positions `start` and on."""
        modality = jnp.zeros_like(call.tokens) if call.modality is None else call.modality
        new = History(x.astype(self.inputs.dtype), call.tokens, modality)

        def put(old: Array, part: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, part, start, axis=1)

        return History(*(put(old, part) for old, part in zip(self, new, strict=True)))


class SparseMLP(nnx.Module):
    """`E` experts behind a router, and optional shared experts that every token visits.

    The first `N` experts are stacked feed-forward ones; those of other kinds follow (`mixed_experts`).
    """

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
        kinds: Kinds = Kinds(),  # noqa: B008 - a constant
        conv_kernel: int = 3,
        noise: WeightNoise = WeightNoise(),  # noqa: B008 - a constant
        rngs: nnx.Rngs,
    ):
        """`num_experts` is `N`, `kinds` says how many others there are.

        `shared_experts` of the same width are kept as one dense MLP with gate 1 (DeepSeekMoE).
        """
        row = spec.row
        self.spec, self.activation = spec, activation
        self.num_ffn, self.num_experts = num_experts, num_experts + sum(kinds)
        if row.gate is not None:
            self.gate = row.gate(width, self.num_experts, rngs=rngs, **_gate_options(spec))
        self.experts = Experts(
            num_experts, width, hidden, activation, out_scale=out_scale, rngs=rngs
        )
        if shared_experts:
            self.shared = MLP(
                width, shared_experts * hidden, activation, out_scale=out_scale, rngs=rngs
            )
        if sum(kinds):
            self.mixed = MixedExperts(
                kinds, width, kernel=conv_kernel, out_scale=out_scale, rngs=rngs
            )
        if noise.target == "gate":
            self.noisy_gate = Noisy(noise, self.gate, stacked=0)
        elif noise.target == "experts":
            self.noisy_experts = Noisy(noise, self.experts, stacked=1)
        if row.stateful:
            counts = None if spec.token_counts is None else np.asarray(spec.token_counts)
            facts = {"width": width, "key": rngs.params(), "token_counts": counts}
            facts |= {"num_experts": self.num_experts, "vocab_size": vocab_size, "k": spec.k}
            state = row.init_state(
                **pick_inputs(row.init_state, facts), **spec.picked(row.init_state)
            )
            self.state = nnx.Dict({name: RouterState(value) for name, value in state.items()})

    def route(
        self,
        x: Float[Array, "B S D"],
        call: Call,
        key: Shaped[Array, ""] | None,
        memory: Any = None,
    ) -> tuple[Routing, Any]:
        """Asks the gate and the router; no expert runs. Returns the gate's memory too."""
        row = self.spec.row
        gate_key, route_key = (None, None) if key is None else jax.random.split(key)
        inputs = _inputs(x, call) | {"memory": memory}
        if call.training or row.needs_key_in_eval:
            inputs["key"] = route_key
        if row.stateful:
            inputs["state"] = {name: value[...] for name, value in self.state.items()}
        gated = self._gate(x, call, gate_key, inputs)
        routing = row.route(
            gated.logits,
            k=self.spec.k,
            **pick_inputs(row.route, inputs | gated.inputs),
            **self.spec.picked(row.route),
        )
        return routing._replace(plan=checkpoint_name(routing.plan, ROUTING_NAME)), gated.memory

    def _gate(
        self, x: Array, call: Call, key: Shaped[Array, ""] | None, inputs: dict[str, Any]
    ) -> Gated:
        if self.spec.row.gate is None:
            return Gated(jnp.zeros((*x.shape[:2], self.num_experts), jnp.float32))
        if call.jitter is not None and key is not None:
            x = jittered(x, call.jitter, key)
        # Noise of the gate itself is not that of the router that follows.
        inputs = inputs | {"key": None if key is None else jax.random.fold_in(key, 1)}
        if not (call.training or self.spec.row.needs_key_in_eval):
            inputs["key"] = None
        named = pick_inputs(type(self.gate).__call__, {**inputs, "tokens": x})
        gate = self.gate
        if hasattr(self, "noisy_gate"):
            gate = self.noisy_gate(gate, _noise_key(key, call))
        return gate(**named)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        call: Call,
        key: Shaped[Array, ""] | None,
        memory: Any = None,
    ) -> Sparse:
        """Output before the residual, the layer's report, and the memory of its gate."""
        routing, memory = self.route(x, call, key, memory)
        out = self._dispatch(x, call, routing, self._expert_params(x, call, key))
        return Sparse(out.output, layer_report(routing, out.kept, call.valid), memory)

    def continued(
        self,
        x: Float[Array, "B S D"],
        call: Call,
        key: Shaped[Array, ""] | None,
        memory: Any,
        history: History,
        start: Int[Array, ""],
    ) -> Sparse:
        """As `__call__`, where the router or an expert looks back at the inputs since the first.

        Args:
            x: `[B S D]`, the inputs of positions `start` to `start + S - 1`.
            call: of these positions.
            key: noise.
            memory: of the gate, over all `N` positions.
            history: of earlier positions.
            start: how many positions it holds.
        """
        history = history.with_part(x, call, start)
        params = self._expert_params(x, call, key)
        if self.spec.row.causality != "C1":
            routing, memory = self.route(x, call, key, memory)
            out = self._dispatch(x, call, routing, params, history, start)
            report = layer_report(routing, out.kept, call.valid)
            return Sparse(out.output, report, memory, history)
        S, places = x.shape[1], history.tokens.shape
        everywhere = jnp.broadcast_to(jnp.arange(places[1]), places)
        whole = call._replace(
            tokens=history.tokens,
            valid=everywhere < start + S,
            positions=everywhere,
            documents=(everywhere < start + S).astype(jnp.int32),
            modality=history.modality,
        )
        routing, memory = self.route(history.inputs.astype(x.dtype), whole, key, memory)

        def now(a: Array) -> Array:  # [B N ...] -> [B S ...]
            return jax.lax.dynamic_slice_in_dim(a, start, S, axis=1)

        if isinstance(routing.plan, Choices):
            routing = jax.tree.map(now, routing)
            out = self._dispatch(x, call, routing, params, history, start)
        else:
            out = self._dispatch(history.inputs.astype(x.dtype), whole, routing, params)
            report = layer_report(routing, out.kept, whole.valid)
            return Sparse(now(out.output), report, memory, history)
        return Sparse(out.output, layer_report(routing, out.kept, call.valid), memory, history)

    def _expert_params(
        self, x: Float[Array, "B S D"], call: Call, key: Shaped[Array, ""] | None
    ) -> ExpertParams:
        experts = self.experts
        if hasattr(self, "noisy_experts"):
            experts = self.noisy_experts(experts, _noise_key(key, call))
        return experts.params(x.dtype)

    def _dispatch(
        self,
        x: Float[Array, "B S D"],
        call: Call,
        routing: Routing,
        params: ExpertParams,
        history: History | None = None,
        start: Int[Array, ""] | None = None,
    ) -> Dispatched:
        """Runs the experts of a plan; `history` up to `x` is for those that look back, in generation."""
        expert_fn = partial(feed_forward, activation=self.activation)
        if not hasattr(self, "mixed"):
            out = call.dispatch(x, routing.plan, params, expert_fn)
            y = out.output.astype(x.dtype)
            if not isinstance(routing.plan, Choices | Slots):  # soft plans know no padding
                y = jnp.where(call.valid[..., None], y, 0.0)
        else:
            assert isinstance(routing.plan, Choices)
            plan = share_zero_gates(routing.plan, self.mixed.kinds.numbers(self.num_ffn)["zero"])
            out = call.dispatch(x, split_choices(plan, self.num_ffn), params, expert_fn)
            out = out._replace(kept=out.kept | (plan.valid & (plan.expert >= self.num_ffn)))
            y = out.output.astype(x.dtype) + self._special(x, call, plan, history, start)
        if hasattr(self, "shared"):
            # Takes nothing from the exchange, so that the compiler may run it while rows travel.
            y = y + self.shared(x)
        return out._replace(output=y)

    def _special(
        self,
        x: Float[Array, "B S D"],
        call: Call,
        plan: Choices,
        history: History | None,
        start: Int[Array, ""] | None,
    ) -> Float[Array, "B S D"]:
        """What experts of other kinds than feed-forward add."""
        if history is None:
            return self.mixed(x, plan, call.documents, call.valid, self.num_ffn)
        assert start is not None
        return self.mixed.continued(x, plan, history.inputs, start, self.num_ffn)


def _noise_key(key: Shaped[Array, ""] | None, call: Call) -> Shaped[Array, ""] | None:
    return jax.random.fold_in(key, WEIGHTS) if call.training and key is not None else None


def initial_memory(spec: RouterSpec, batch: int, length: int, num_experts: int) -> Any:
    """What the gate of the first sparse layer is handed; None where gates remember nothing."""
    make = getattr(spec.row.gate, "initial_memory", None)
    if make is None:
        return None
    return make(batch, length, num_experts, **spec.picked(make))


def shared_gate(spec: RouterSpec, width: int, num_experts: int, rngs: nnx.Rngs) -> Any:
    """The module that the gates of all layers share; None where there is none."""
    if spec.row.shared is None:
        return None
    return spec.row.shared(width, num_experts, rngs=rngs, **spec.picked(spec.row.shared))


def _gate_options(spec: RouterSpec) -> dict[str, Any]:
    """Options of the gate's constructor; it may ask for `k` too."""
    assert spec.row.gate is not None
    return spec.picked(spec.row.gate) | pick_inputs(spec.row.gate, {"k": spec.k})


def _inputs(x: Float[Array, "B S D"], call: Call) -> dict[str, Any]:
    """What gates and routers may name, for every token."""
    places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    positions = places if call.positions is None else call.positions
    documents = call.valid.astype(jnp.int32) if call.documents is None else call.documents
    modality = jnp.zeros_like(places) if call.modality is None else call.modality
    return {
        "tokens": x,
        "valid": call.valid,
        "token_ids": call.tokens,
        "positions": positions,
        "documents": documents,
        "modality": modality,
        "training": call.training,
        "shared": call.shared,
    }
