"""Random paths through the depth: skipped layers, and inputs from earlier layers.

Stochastic depth (Huang et al. 2016, arXiv:1603.09382) and LayerDrop (Fan et al. 2020,
arXiv:1909.11556) leave layers out; random jumps add the states of earlier layers to a layer's input.
Both are the plain Transformer in expectation, act on each position alone (C0), and work inside
`jax.lax.scan` over layers: the earlier states lie in a buffer `[N B S D]` that the scan carries.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
import numpy as np

from moe.errors import ConfigError
from moe.routing.types import LayerReport, Scalar

SCOPES = ("batch", "sequence")  # what one draw decides for
SCHEDULES = ("linear", "constant")
JUMPS = ("bernoulli", "single")


def check(
    *,
    survival: float,
    schedule: str,
    scope: str,
    jump: float,
    jump_mode: str,
    jump_temperature: float,
    rescale: bool = True,
) -> None:
    """Refuses numbers out of range and unknown names.

    Args:
        survival: probability that the last layer runs.
        schedule: of `survival_rates`.
        scope: of the draws.
        jump: probability of each jump.
        jump_mode: of `JumpIn`.
        jump_temperature: of the choice of a single source.
        rescale: as for `skip`; either will do.

    Raises:
        ConfigError: the first that is impossible.
    """
    del rescale
    if not 0.0 < survival <= 1.0:
        raise ConfigError(
            f"paths.survival={survival} is not in (0, 1]: it is the probability that a layer runs; 1 runs "
            "all."
        )
    if not 0.0 <= jump <= 1.0:
        raise ConfigError(
            f"paths.jump={jump} is not in [0, 1]: it is the probability of each jump; 0 is none."
        )
    if not jump_temperature > 0.0:
        raise ConfigError(
            f"paths.jump_temperature={jump_temperature} must be positive; 1 is neutral."
        )
    for name, value, known in (
        ("schedule", schedule, SCHEDULES),
        ("scope", scope, SCOPES),
        ("jump_mode", jump_mode, JUMPS),
    ):
        if value not in known:
            raise ConfigError(
                f"paths.{name}={value!r} is not one of {', '.join(known)}; choose one."
            )


def survival_rates(layers: int, last: float, schedule: str = "linear") -> Float[np.ndarray, " N"]:
    """Probability that each layer runs, float32.

    Args:
        layers: `N`.
        last: of the last layer: 0.5 in the vision models of Huang et al., nearer to 1 for language.
        schedule: "linear" is `p_l = 1 - (l/N) (1 - last)`, l from 1, so that early layers, on which
            all others build, are safest; "constant" is `last` everywhere (LayerDrop: 1 - rate).
    """
    if schedule == "constant":
        return np.full(layers, last, np.float32)
    return (1.0 - np.arange(1, layers + 1) / layers * (1.0 - last)).astype(np.float32)


def draw(key: PRNGKeyArray, rate: Scalar, shape: tuple[int, ...], scope: str) -> Bool[Array, "..."]:
    """Bernoulli draws for `shape`, whose last axis is the batch; one for all rows in scope "batch"."""
    drawn = shape if scope == "sequence" else (*shape[:-1], 1)
    return jnp.broadcast_to(jax.random.bernoulli(key, rate, drawn), shape)


def skip(
    x: Float[Array, "B S D"],
    delta: Float[Array, "B S D"],
    key: PRNGKeyArray | None,
    survival: Scalar,
    *,
    scope: str = "batch",
    training: bool,
    rescale: bool = True,
) -> Float[Array, "B S D"]:
    """Adds what a layer would change, or leaves it out: `x + (b/p) delta`, `b ~ Bernoulli(p)`.

    A row whose layer is left out stays as it was, bit for bit. The layer has run all the same;
    `run_if` saves it.

    Args:
        x: `[B S D]`.
        delta: output of the layer less its input.
        key: of this layer; read in training only.
        survival: `p`, may be traced.
        scope: "batch" draws once, "sequence" for each row.
        training: in evaluation the layer always runs, with weight 1, the expectation of training.
        rescale: False adds `b delta`, as LayerDrop does, whose deep models are meant to be pruned.
    """
    if not training or key is None:
        return x + delta
    keep = draw(key, survival, (x.shape[0],), scope)[:, None, None]
    weight = 1.0 / jnp.maximum(survival, 1e-6) if rescale else jnp.float32(1.0)
    return jnp.where(keep, x + (delta * weight).astype(x.dtype), x)


def run_if(keep: Bool[Array, ""], run: Callable[[], Any]) -> Any:
    """`run()` where `keep`, else zeros of its shape and no compute.

    Draw `keep` with `draw(key, p, (1,), "batch")[0]` and divide the change by `p` afterwards. In a
    `LayerReport` of a layer that did not run nobody chose anybody: its experts are -1.
    """

    def nothing() -> Any:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run))
        return jax.tree.map(
            lambda r: r._replace(expert=r.expert - 1) if isinstance(r, LayerReport) else r,
            zeros,
            is_leaf=lambda r: isinstance(r, LayerReport),
        )

    return jax.lax.cond(keep, run, nothing)


def kept_layers(layers: int, every: int) -> list[int]:
    """Layers that remain when every `every`-th is pruned: LayerDrop of rate `1/every` is ready for it."""
    return [i for i in range(layers) if (i + 1) % every]


def prune(stacked: Any, kept: Sequence[int]) -> Any:
    """Stacked layers (leading axis: layers) without those that are not `kept`."""
    index = np.asarray(kept, np.int32)
    return jax.tree.map(lambda a: a[index], stacked)


def empty_history(layers: int, like: Float[Array, "B S D"]) -> Float[Array, "N B S D"]:
    """Room for the inputs of `layers` layers. Under `jax.grad` a scan keeps one for each layer."""
    return jnp.zeros((layers, *like.shape), like.dtype)


def remember(
    history: Float[Array, "N B S D"], x: Float[Array, "B S D"], index: Int[Array, ""] | int
) -> Float[Array, "N B S D"]:
    """The history with `x` as the input of layer `index`."""
    return jax.lax.dynamic_update_index_in_dim(history, x, index, axis=0)


class JumpIn(nnx.Module):
    """Adds states of earlier layers to a layer's input.

    Mode "bernoulli": `h + sum_s (m_s / q) a_s h_s`, `m_s ~ Bernoulli(q)` for each earlier state
    (q = 1 is the deterministic twin, after DenseFormer, Pagliardini et al. 2024, arXiv:2402.02622).
    Mode "single": `h + a_s h_s` for one source `s ~ softmax(w / tau)`; the term carries the factor
    `pi_s / stop_gradient(pi_s)`, of value 1, so that the expected gradient of `w` is the gradient of
    the expected input. A drawn index alone would leave `w` without any.

    Args:
        layers: `N`, states in the buffer.
        mode: one of `JUMPS`.

    Attributes:
        scale: `a`, float32 `[N]`; zeros, so that a fresh model is the plain Transformer.
        source: `w`, float32 `[N]`, in mode "single".
    """

    def __init__(self, layers: int, mode: str = "bernoulli"):
        self.mode = mode
        self.scale = nnx.Param(jnp.zeros((layers,)), axes=(None,))
        if mode == "single":
            self.source = nnx.Param(jnp.zeros((layers,)), axes=(None,))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        history: Float[Array, "N B S D"],
        index: Int[Array, ""] | int,
        key: PRNGKeyArray | None,
        *,
        rate: Scalar,
        temperature: Scalar = 1.0,
        scope: str = "sequence",
        training: bool,
    ) -> Float[Array, "B S D"]:
        """The input of layer `index`.

        Args:
            x: output of the layer before.
            history: inputs of layers 0 to `index - 1`; the rest is not read. Layer 0 has no source.
            index: of this layer, may be traced.
            key: of this layer; read in training only.
            rate: `q`, may be traced; 0 is the plain Transformer, in evaluation too. In mode
                "single", the probability that there is a jump at all.
            temperature: `tau`, of mode "single".
            scope: "batch" draws once, "sequence" for each row.
            training: in evaluation every draw gives way to its expectation.
        """
        earlier = jnp.arange(history.shape[0]) < index  # [N]
        rows = (x.shape[0],)
        if self.mode == "single":
            weight = self._single(key if training else None, rows, earlier, temperature, scope)
        else:
            weight = jnp.ones((len(earlier), *rows))
        # q = 0 would otherwise jump in evaluation only.
        weight = jnp.where(jnp.asarray(rate) > 0, weight, 0.0)
        if training and key is not None:
            shape = (1 if self.mode == "single" else len(earlier), *rows)
            jumps = draw(jax.random.fold_in(key, 1), rate, shape, scope)
            weight = jnp.where(jumps, weight / jnp.maximum(rate, 1e-6), 0.0)
        weight = jnp.where(earlier[:, None], self.scale[...][:, None] * weight, 0.0)
        return x + jnp.einsum("nb,nbsd->bsd", weight.astype(x.dtype), history)

    def _single(
        self,
        key: PRNGKeyArray | None,
        rows: tuple[int, ...],
        earlier: Bool[Array, " N"],
        temperature: Scalar,
        scope: str,
    ) -> Float[Array, "N B"]:
        """One-hot draws with the gradient of their probability; the probabilities without a key."""
        logits = jnp.where(earlier, self.source[...] / temperature, -1e30)
        share = jax.nn.softmax(logits)[:, None]  # [N 1]
        if key is None:
            return jnp.broadcast_to(share, (len(earlier), *rows))
        drawn = jax.random.categorical(key, logits, shape=rows if scope == "sequence" else (1,))
        hit = jnp.broadcast_to(drawn, rows)[None] == jnp.arange(len(earlier))[:, None]
        return jnp.where(hit, share / jax.lax.stop_gradient(jnp.maximum(share, 1e-30)), 0.0)
