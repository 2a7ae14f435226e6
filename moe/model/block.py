"""One layer of the Transformer: attention and feed-forward, each with its residual."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moe.model.attention import RMSNorm
from moe.model.attention_table import make_attention
from moe.model.attention_types import AttentionOutput
from moe.model.depth import Delta, MixtureOfDepths
from moe.model.experts import MLP
from moe.model.layer import Call, History, SparseMLP
from moe.model.paths import JumpIn
from moe.model.spec import DEPTH, KINDS, ModelSpec
from moe.parallel.rules import constrain_batch
from moe.routing.router import pick_inputs
from moe.routing.types import LayerReport

ATTENTION_NOISE = 5  # folded into the key of a layer, of which five are split off


class Stream(NamedTuple):
    """What flows from layer to layer."""

    x: Float[Array, "B S D"]
    memory: Any = None  # of the gates: recurrence over depth
    earlier: Any = None  # inputs of layers so far [N B S D], where layers jump


class LayerCache(NamedTuple):
    """What one layer keeps of earlier positions, in generation."""

    attention: Any
    history: tuple[History, ...] = ()  # of sparse layers that look back


class Layered(NamedTuple):
    """What one layer gives back."""

    stream: Stream
    reports: tuple[LayerReport, ...]  # one for each sparse layer
    terms: dict[str, Float[Array, "B S"]]  # unweighted losses of the block itself
    cache: LayerCache | None


class Block(nnx.Module):
    """Pre-normalised attention and feed-forward, each with its residual."""

    def __init__(self, spec: ModelSpec, kind: str, *, rngs: nnx.Rngs):
        """`kind` is one of `KINDS`.

        "double" has two sparse layers, one after the other; through "depth" (dense) and "depth_sparse"
        go only some of the tokens.
        """
        self.kind, self.lookback = kind, KINDS[kind] > 0 and spec.looks_back
        self.attention_norm = RMSNorm(spec.width, spec.norm_eps)
        self.attention = _attention(spec, rngs)
        self.mlp_norm = RMSNorm(spec.width, spec.norm_eps)
        self.mlp = _sparse(spec, rngs) if KINDS[kind] else _dense(spec, rngs)
        if kind == "double":
            self.second_norm = RMSNorm(spec.width, spec.norm_eps)
            self.second = _sparse(spec, rngs)
        if kind in DEPTH:
            self.depth = MixtureOfDepths(spec.width, spec.depth_capacity, rngs=rngs)
            self.causal = spec.causal
        if spec.paths.jump > 0:
            self.jump = JumpIn(spec.num_layers, spec.paths.jump_mode)

    def __call__(
        self,
        stream: Stream,
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        call: Call,
        key: Shaped[Array, ""] | None,
        cache: LayerCache | None,
        start: Int[Array, ""] | None,
    ) -> Layered:
        """One layer; arguments as for `Attention` and `SparseMLP`."""
        if not hasattr(self, "depth"):
            return self._through(stream, positions, segments, call, key, cache, start)

        def change(x, positions, segments, call, key, cache, start, memory) -> Delta:
            done = self._through(Stream(x, memory), positions, segments, call, key, cache, start)
            told = (done.reports, done.terms, done.cache, done.stream.memory)
            return Delta(done.stream.x - x, *told)

        # A model that must be causal decides by the predictor wherever nothing is learned.
        passed = self.depth(
            change,
            stream.x,
            positions,
            segments,
            call,
            key,
            cache,
            start,
            stream.memory,
            causal=self.causal and not call.training,
        )
        terms = {**passed.terms, "predictor": passed.depth.bce}
        after = Stream(constrain_batch(passed.output), passed.memory)
        return Layered(after, passed.reports, terms, passed.cache)

    def _through(
        self,
        stream: Stream,
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        call: Call,
        key: Shaped[Array, ""] | None,
        cache: LayerCache | None,
        start: Int[Array, ""] | None,
    ) -> Layered:
        """Attention and feed-forward for all of these tokens."""
        keys = (None,) * 5 if key is None else jax.random.split(key, 5)
        x, memory = stream.x, stream.memory
        attended = self._attend(x, positions, segments, call, key, cache, start)
        x = x + drop_out(attended.output, call.dropout, keys[0])
        reports, history = [], []
        parts = [(self.mlp_norm, self.mlp, keys[1], keys[2])]
        if self.kind == "double":
            parts.append((self.second_norm, self.second, keys[3], keys[4]))
        for norm, mlp, route_key, drop_key in parts:
            h = norm(x)
            if not isinstance(mlp, SparseMLP):
                out = mlp(h)
            elif cache is not None and self.lookback:
                assert start is not None
                past = cache.history[len(history)]
                done = mlp.continued(h, call, route_key, memory, past, start)
                out, memory = done.output, done.memory
                reports, history = [*reports, done.report], [*history, done.history]
            else:
                done = mlp(h, call, route_key, memory)
                out, memory, reports = done.output, done.memory, [*reports, done.report]
            x = x + drop_out(out, call.dropout, drop_key)
        after = None
        if cache is not None:
            after = LayerCache(attended.cache, (*history, *cache.history[len(history) :]))
        terms = dict(attended.terms)
        return Layered(Stream(constrain_batch(x), memory), tuple(reports), terms, after)

    def _attend(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        call: Call,
        key: Shaped[Array, ""] | None,
        cache: LayerCache | None,
        start: Int[Array, ""] | None,
    ) -> AttentionOutput:
        noise = None
        if call.training and key is not None:
            noise = jax.random.fold_in(key, ATTENTION_NOISE)
        past = None if cache is None else cache.attention
        named = pick_inputs(type(self.attention).__call__, {"key": noise, "prefix": call.prefix})
        x = self.attention_norm(x)
        return AttentionOutput(*self.attention(x, positions, segments, past, start, **named))


def _attention(spec: ModelSpec, rngs: nnx.Rngs) -> nnx.Module:
    return make_attention(
        spec.attention.name,
        dict(spec.attention.options),
        spec.width,
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        sequence_length=spec.sequence_length,
        causal=spec.causal,
        qk_norm=spec.qk_norm,
        rope_base=spec.rope_base,
        norm_eps=spec.norm_eps,
        out_scale=out_scale(spec),
        rngs=rngs,
    )


def _dense(spec: ModelSpec, rngs: nnx.Rngs) -> MLP:
    return MLP(spec.width, spec.mlp_width, spec.activation, out_scale=out_scale(spec), rngs=rngs)


def _sparse(spec: ModelSpec, rngs: nnx.Rngs) -> SparseMLP:
    return SparseMLP(
        spec.router,
        num_experts=spec.num_experts,
        width=spec.width,
        hidden=spec.expert_width,
        shared_experts=spec.shared_experts,
        vocab_size=spec.vocab_size,
        activation=spec.activation,
        out_scale=out_scale(spec),
        kinds=spec.expert_kinds,
        conv_kernel=spec.conv_kernel,
        noise=spec.weight_noise,
        rngs=rngs,
    )


def out_scale(spec: ModelSpec) -> float:
    """Scale of what a layer adds to the residual, so that its variance does not grow with depth."""
    return (2 * spec.num_layers) ** -0.5


def drop_out(x: Array, rate: Array | float | None, key: Array | None) -> Array:
    """Zeroes a share of the numbers and scales up the rest; nothing without a rate or a key."""
    if rate is None or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)
