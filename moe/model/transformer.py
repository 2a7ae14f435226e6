"""Decoder-only Transformer whose feed-forward layers follow a repeating pattern of dense and sparse."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_policies
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.model import attention_table
from moe.model.attention import RMSNorm
from moe.model.block import Block, LayerCache, Layered, Stream, drop_out
from moe.model.experts import fan_in_init, project
from moe.model.head import PairHead, make_pool, pool_rows
from moe.model.layer import Call, History, initial_memory, shared_gate
from moe.model.paths import empty_history
from moe.model.spec import ModelSpec
from moe.model.stems import make_stem, place, stem_positions
from moe.model.travel import Run, travel
from moe.parallel.rules import constrain_batch
from moe.routing.selection import ROUTING_NAME
from moe.routing.types import LayerReport

EMBEDDING_NOISE = 3  # folded into the key of a pass; stacks of layers take 0 and 1, pools 2
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

    # float32; [B M] over the classes of a classifier of rows; None of a model of pairs
    logits: Float[Array, "B *S V"] | None
    reports: LayerReport | None  # leading axis L; None for a dense model
    cache: LayerCache | None  # leading axis: layers
    terms: dict[str, Float[Array, "B S"]] = {}  # noqa: RUF012 - of the layers themselves, their mean
    pair: Float[Array, "B 2 D"] | None = None  # float32, of length 1: segments 1 and 2 of each row
    scale: Float[Array, ""] | None = None  # that similarities of pairs are multiplied by


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
        if spec.stem is not None:
            self.stem = make_stem(spec.stem, spec.width, rngs)
        if spec.first_dense:
            self.first = _stack(spec, ("dense",), spec.first_dense, rngs)
        if spec.repeats:
            self.blocks = _stack(spec, spec.pattern, spec.repeats, rngs)
        shared = shared_gate(spec.router, spec.width, spec.all_experts, rngs)
        if shared is not None and spec.sparse_layers:
            self.shared_gate = shared
        self.norm = RMSNorm(spec.width, spec.norm_eps)
        pool = make_pool(spec, rngs)
        if pool is not None:
            self.pool = pool
        if spec.output == "pair":
            self.pair = PairHead(spec.width, rngs=rngs)
        elif spec.output == "classes" or not spec.tie_embeddings:
            rows = spec.output == "classes"
            outputs, letter = (spec.classes, None) if rows else (spec.vocab_size, "V")
            self.head = nnx.Param(
                fan_in_init(spec.width)(rngs.params(), (spec.width, outputs)), axes=("D", letter)
            )

    def __call__(
        self,
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        call: Call,
        cache: LayerCache | None = None,
        start: Int[Array, ""] | None = None,
    ) -> ModelOutput:
        """Logits at every position of `call.tokens`, or of each row's class, or a pair of vectors a row.

        Args:
            positions: position of each token in its document.
            segments: document of each token, 0 for padding.
            call: tokens, padding mask, dispatch and noise. With `frames`, positions whose `modality` is
                1 hold what the stem makes of them, from the first on.
            cache: what layers keep of earlier positions, leading axis layers (generation).
            start: how many positions of the cache are filled.
        """
        noise = None if call.key is None else jax.random.fold_in(call.key, EMBEDDING_NOISE)
        stream = Stream(drop_out(self._embedded(call), call.dropout, noise))
        if self.spec.paths.jump > 0:
            stream = stream._replace(earlier=empty_history(self.spec.num_layers, stream.x))
        call = call._replace(
            positions=positions,
            documents=segments,
            shared=getattr(self, "shared_gate", None),
            frames=None,
        )
        told_of, done = [], 0
        for index, name in enumerate(("first", "blocks")):
            if not hasattr(self, name):
                continue
            stack: Repeat = getattr(self, name)
            count = self.spec.first_dense if name == "first" else self.spec.repeats * stack.depth
            part = _part(cache, slice(done, done + count))
            key = None if call.key is None else jax.random.fold_in(call.key, index)
            if name == "blocks":
                stream = self._with_memory(stream, cache)
            stream, told = self._scan(
                stack, stream, positions, segments, call._replace(key=key), part, start, done
            )
            done += count
            told_of.append(told)
        if cache is not None:
            caches = [told.cache for told in told_of]
            cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
        reports = [told.reports for told in told_of if told.reports is not None]
        out = ModelOutput(None, reports[0] if reports else None, cache, _mean_terms(told_of))
        x = self.norm(stream.x)
        if self.spec.output == "pair":
            return out._replace(pair=self.pair(x, segments), scale=self.pair.scale())
        return out._replace(logits=self._logits(x, call))

    def _embedded(self, call: Call) -> Float[Array, "B S D"]:
        """What stands at each position before the first layer.

        Raises:
            ValueError: frames without a stem, or without the kinds of positions.
        """
        x = constrain_batch(self.embedding[...].astype(jnp.dtype(self.spec.dtype))[call.tokens])
        if call.frames is None:
            return x
        if self.spec.stem is None or call.modality is None:
            raise ValueError("frames need ModelSpec.stem and Call.modality")
        from_frames = (call.modality == 1) & call.valid
        count = stem_positions(self.spec.stem)
        return constrain_batch(place(self.stem, x, call.frames, from_frames, count))

    def _with_memory(self, stream: Stream, cache: LayerCache | None) -> Stream:
        """What the gate of the first sparse layer remembers; over the whole history where one is kept."""
        B, S = stream.x.shape[:2]
        if cache is not None and cache.history and self.spec.router_looks_back:
            S = cache.history[0].tokens.shape[2]
        spec = self.spec
        return stream._replace(memory=initial_memory(spec.router, B, S, spec.all_experts))

    def _scan(
        self,
        stack: Repeat,
        stream: Stream,
        positions: Array,
        segments: Array,
        call: Call,
        cache: LayerCache | None,
        start: Array | None,
        first: int,
    ) -> tuple[Stream, "Told"]:
        """Runs the stacked turns in order, from layer `first`; what they tell gets a leading layer axis."""
        graph, state = nnx.split(stack)
        repeats = jax.tree.leaves(state)[0].shape[0]
        if cache is not None:
            cache = jax.tree.map(lambda a: a.reshape(repeats, stack.depth, *a.shape[1:]), cache)

        def turn(stream: Stream, scanned: tuple) -> tuple[Stream, Told]:
            state, index, cache = scanned
            reports, caches, terms = [], [], {}
            for i, block in enumerate(nnx.merge(graph, state).blocks()):
                key = None
                if call.key is not None:
                    key = jax.random.fold_in(call.key, index * stack.depth + i)
                run = _layer(block, positions, key, _part(cache, i), start)
                number, jump = first + index * stack.depth + i, getattr(block, "jump", None)
                done = travel(self.spec, jump, number, stream, segments, call, key, run)
                stream = done.stream
                reports += done.reports
                caches += [] if done.cache is None else [done.cache]
                for name, value in done.terms.items():
                    terms[name] = [*terms.get(name, []), value]
            terms = {name: jnp.stack(values) for name, values in terms.items()}
            return stream, Told(_stacked(reports), terms, _stacked(caches))

        policy = REMAT[self.spec.remat]
        body = turn if policy is None else jax.checkpoint(turn, policy=policy)
        stream, told = jax.lax.scan(body, stream, (state, jnp.arange(repeats), cache))
        return stream, _merged(told)

    def _logits(self, x: Float[Array, "B S D"], call: Call) -> Float[Array, "B *S V"]:
        if self.spec.output == "classes":
            x = pool_rows(getattr(self, "pool", None), x, call)
            return (x.astype(jnp.float32) @ self.head[...]).astype(jnp.float32)
        kernel = self.embedding[...].T if self.spec.tie_embeddings else self.head[...]
        logits = project(x, kernel).astype(jnp.float32)
        if self.spec.logit_softcap is not None:
            logits = self.spec.logit_softcap * jnp.tanh(logits / self.spec.logit_softcap)
        return logits


def _layer(block: Block, positions: Array, key: Array | None, cache: Any, start: Any) -> Run:
    """The block as `travel` runs it."""

    def run(stream: Stream, segments: Array, call: Call) -> Layered:
        return block(stream, positions, segments, call, key, cache, start)

    return run


def _stacked(parts: list):
    """One pytree with a new leading axis; None for nothing."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) if parts else None


class Told(NamedTuple):
    """What the layers of a stack tell; leading axis: layers."""

    reports: LayerReport | None
    terms: dict[str, Float[Array, "... B S"]]
    cache: LayerCache | None


def _mean_terms(stacks: list[Told]) -> dict[str, Float[Array, "B S"]]:
    """The mean of each term over all layers that have it."""
    names = dict.fromkeys(name for told in stacks for name in told.terms)
    values = {n: [told.terms[n] for told in stacks if n in told.terms] for n in names}
    return {name: jnp.concatenate(parts).mean(axis=0) for name, parts in values.items()}


def _part(cache: LayerCache | None, which: int | slice) -> LayerCache | None:
    return None if cache is None else jax.tree.map(lambda a: a[which], cache)


def _merged(tree):
    """Joins the axes (repeat, layer of the turn) to one axis of layers."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def empty_cache(spec: ModelSpec, batch: int, length: int) -> LayerCache:
    """A cache for `length` positions; leading axis layers.

    Attentions whose cache tells positions apart (`gaps`) keep the segment of each: rows may have padding,
    segment 0, anywhere (`build.takes_padding`).
    """
    dtype = jnp.dtype(spec.dtype)
    sizes = {"width": spec.width, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
    options = dict(spec.attention.options)
    one = attention_table.empty_cache(
        spec.attention.name, options, batch, length, dtype=dtype, **sizes
    )
    attention = jax.tree.map(lambda a: jnp.zeros((spec.num_layers, *a.shape), a.dtype), one)
    if attention_table.find_attention(spec.attention.name).gaps:
        attention = attention._replace(segment=jnp.zeros(attention.key.shape[:3], jnp.int32))
    history: tuple[History, ...] = ()
    if spec.sparse_layers and spec.looks_back:
        size = 2 if "double" in spec.pattern else 1
        shape = (spec.num_layers, batch, length)
        inputs, tokens = jnp.zeros((*shape, spec.width), dtype), jnp.zeros(shape, jnp.int32)
        history = (History(inputs, tokens, tokens),) * size
    return LayerCache(attention, history)
