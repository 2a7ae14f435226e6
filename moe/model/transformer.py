"""Decoder-only Transformer whose feed-forward layers follow a repeating pattern of dense and sparse."""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_policies
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moe.model.attention import Attention, KeyValues, RMSNorm
from moe.model.experts import MLP, fan_in_init, project
from moe.model.layer import Call, RouterSpec, SparseMLP
from moe.parallel.rules import constrain_batch
from moe.routing.selection import ROUTING_NAME
from moe.routing.types import LayerReport

# name -> policy of what the backward pass keeps; the routing decision is always kept.
_keep_routing = checkpoint_policies.save_only_these_names(ROUTING_NAME)
REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": _keep_routing,
    "dots": checkpoint_policies.save_from_both_policies(
        checkpoint_policies.dots_with_no_batch_dims_saveable, _keep_routing
    ),
}


class ModelOutput(NamedTuple):
    """Next-token logits, and what each sparse layer reports."""

    logits: Float[Array, "B S V"]  # float32
    reports: LayerReport | None  # leading axis L; None for a dense model
    cache: KeyValues | None  # leading axis: layers


class ModelSpec(NamedTuple):
    """Shape of the model: the section `model` of the config, with what it takes from others."""

    vocab_size: int
    num_layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    expert_width: int
    num_experts: int
    shared_experts: int
    pattern: tuple[str, ...]
    first_dense: int
    activation: str
    qk_norm: str
    tie_embeddings: bool
    dropout: float
    logit_softcap: float | None
    rope_base: float
    norm_eps: float
    remat: str
    dtype: str
    router: RouterSpec

    @property
    def repeats(self) -> int:
        """How often the pattern is repeated after the first dense layers."""
        return (self.num_layers - self.first_dense) // len(self.pattern)

    @property
    def sparse_layers(self) -> int:
        """`L`: layers with experts."""
        return self.repeats * self.pattern.count("sparse")


class Block(nnx.Module):
    """Pre-normalised attention and feed-forward, each with its residual."""

    def __init__(self, spec: ModelSpec, kind: str, *, rngs: nnx.Rngs):
        """`kind` is "dense" or "sparse"."""
        out_scale = (2 * spec.num_layers) ** -0.5
        self.attention_norm = RMSNorm(spec.width, spec.norm_eps)
        self.attention = Attention(
            spec.width,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            qk_norm=spec.qk_norm,
            rope_base=spec.rope_base,
            norm_eps=spec.norm_eps,
            out_scale=out_scale,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(spec.width, spec.norm_eps)
        if kind == "dense":
            self.mlp = MLP(
                spec.width, spec.mlp_width, spec.activation, out_scale=out_scale, rngs=rngs
            )
        else:
            self.mlp = SparseMLP(
                spec.router,
                num_experts=spec.num_experts,
                width=spec.width,
                hidden=spec.expert_width,
                shared_experts=spec.shared_experts,
                vocab_size=spec.vocab_size,
                activation=spec.activation,
                out_scale=out_scale,
                rngs=rngs,
            )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        call: Call,
        key: Shaped[Array, ""] | None,
        cache: KeyValues | None,
        start: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B S D"], LayerReport | None, KeyValues | None]:
        """One layer; arguments as for `Attention` and `SparseMLP`."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        out, cache = self.attention(self.attention_norm(x), positions, segments, cache, start)
        x = x + _dropout(out, call.dropout, keys[0])
        h = self.mlp_norm(x)
        if isinstance(self.mlp, SparseMLP):
            out, report = self.mlp(h, call, keys[1])
        else:
            out, report = self.mlp(h), None
        return constrain_batch(x + _dropout(out, call.dropout, keys[2])), report, cache


def _dropout(x: Array, rate: Array | float | None, key: Array | None) -> Array:
    if rate is None or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


class Repeat(nnx.Module):
    """One turn of the pattern."""

    def __init__(self, spec: ModelSpec, kinds: tuple[str, ...], *, rngs: nnx.Rngs):
        """Blocks are named `layer0`, `layer1`, ... in the order of `kinds`."""
        self.depth = len(kinds)
        for i, kind in enumerate(kinds):
            setattr(self, f"layer{i}", Block(spec, kind, rngs=rngs))

    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return [getattr(self, f"layer{i}") for i in range(self.depth)]


def _stack(spec: ModelSpec, kinds: tuple[str, ...], repeats: int, rngs: nnx.Rngs) -> Repeat:
    """`repeats` turns of the pattern with their arrays stacked on a leading axis."""

    @nnx.split_rngs(splits=repeats)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Repeat:
        return Repeat(spec, kinds, rngs=rngs)

    return make(rngs)


class Transformer(nnx.Module):
    """Embedding, stacked blocks under `jax.lax.scan`, norm, logits."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        """Draws every parameter from `rngs.params`; float32."""
        self.spec = spec
        # Of unit scale, so that what the first layers add does not bury which token it is: routers
        # live on that. As the output projection too, tied embeddings keep logits of unit scale.
        scale = spec.width**-0.5 if spec.tie_embeddings else 1.0
        self.embedding = nnx.Param(
            nnx.initializers.normal(scale)(rngs.params(), (spec.vocab_size, spec.width)),
            axes=("V", "D"),
        )
        if spec.first_dense:
            self.first = _stack(spec, ("dense",), spec.first_dense, rngs)
        if spec.repeats:
            self.blocks = _stack(spec, spec.pattern, spec.repeats, rngs)
        self.norm = RMSNorm(spec.width, spec.norm_eps)
        if not spec.tie_embeddings:
            self.head = nnx.Param(
                fan_in_init(spec.width)(rngs.params(), (spec.width, spec.vocab_size)),
                axes=("D", "V"),
            )

    def __call__(
        self,
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        call: Call,
        cache: KeyValues | None = None,
        start: Int[Array, ""] | None = None,
    ) -> ModelOutput:
        """Logits of the next token at every position of `call.tokens`.

        Args:
            positions: position of each token in its document.
            segments: document of each token, 0 for padding.
            call: tokens, padding mask, dispatch and noise.
            cache: keys and values of earlier positions, leading axis layers (generation).
            start: how many positions of the cache are filled.
        """
        dtype = jnp.dtype(self.spec.dtype)
        x = constrain_batch(self.embedding[...].astype(dtype)[call.tokens])
        reports, caches, done = [], [], 0
        for index, name in enumerate(("first", "blocks")):
            if not hasattr(self, name):
                continue
            stack: Repeat = getattr(self, name)
            count = self.spec.first_dense if name == "first" else self.spec.repeats * stack.depth
            part = _part(cache, slice(done, done + count))
            key = None if call.key is None else jax.random.fold_in(call.key, index)
            x, report, part = self._scan(
                stack, x, positions, segments, call._replace(key=key), part, start
            )
            done += count
            if report is not None:
                reports.append(report)
            caches.append(part)
        if cache is not None:
            cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
        return ModelOutput(self._logits(x), reports[0] if reports else None, cache)

    def _scan(
        self,
        stack: Repeat,
        x: Array,
        positions: Array,
        segments: Array,
        call: Call,
        cache: KeyValues | None,
        start: Array | None,
    ) -> tuple[Array, LayerReport | None, KeyValues | None]:
        """Runs the stacked turns in order; reports and caches come back with a leading layer axis."""
        graph, state = nnx.split(stack)
        repeats = jax.tree.leaves(state)[0].shape[0]
        if cache is not None:
            cache = jax.tree.map(lambda a: a.reshape(repeats, stack.depth, *a.shape[1:]), cache)

        def turn(x: Array, scanned: tuple) -> tuple[Array, tuple]:
            state, index, cache = scanned
            reports, caches = [], []
            for i, block in enumerate(nnx.merge(graph, state).blocks()):
                key = None
                if call.key is not None:
                    key = jax.random.fold_in(call.key, index * stack.depth + i)
                part = _part(cache, i)
                x, report, part = block(x, positions, segments, call, key, part, start)
                reports += [] if report is None else [report]
                caches += [] if part is None else [part]
            return x, (_stacked(reports), _stacked(caches))

        policy = REMAT[self.spec.remat]
        body = turn if policy is None else jax.checkpoint(turn, policy=policy)
        x, (reports, cache) = jax.lax.scan(body, x, (state, jnp.arange(repeats), cache))
        return x, _merged(reports), _merged(cache)

    def _logits(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        x = self.norm(x)
        kernel = self.embedding[...].T if self.spec.tie_embeddings else self.head[...]
        logits = project(x, kernel).astype(jnp.float32)
        if self.spec.logit_softcap is not None:
            logits = self.spec.logit_softcap * jnp.tanh(logits / self.spec.logit_softcap)
        return logits


def _stacked(parts: list):
    """One pytree with a new leading axis; None for nothing."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) if parts else None


def _part(cache: KeyValues | None, which: int | slice) -> KeyValues | None:
    return None if cache is None else KeyValues(cache.key[which], cache.value[which])


def _merged(tree):
    """Joins the axes (repeat, layer of the turn) to one axis of layers."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def empty_cache(spec: ModelSpec, batch: int, length: int) -> KeyValues:
    """A key/value cache for `length` positions; leading axis layers."""
    shape = (spec.num_layers, batch, length, spec.kv_heads, spec.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(spec.dtype))
    return KeyValues(zeros, zeros)
