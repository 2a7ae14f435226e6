"""Soft MoE: experts work on mixtures of tokens, tokens get mixtures of what experts made of them.

Puigcerver et al. 2024 (arXiv:2308.00951). Nothing is chosen, so nothing drops and everything has a
gradient; but every slot holds a share of every token of the row, later ones included: C3, without a
causal form.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.errors import ConfigError
from moe.routing.gates import Gated, project
from moe.routing.router import Router
from moe.routing.types import Mixing, Routing

_TINY = 1e-12  # below any squared length of a token; keeps the gradient at 0 finite


class SoftGate(nnx.Module):
    """A logit for each token and slot: a scaled cosine (the paper's normalisation).

    `logits = scale * x / |x| . phi_p / |phi_p|`, which does not change when tokens grow with the width
    of the model.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws `phi` from normal(0, D^-1/2).
        slots: slots an expert, `P / E`. Equal compute to `k` experts a token takes `S k / E`.

    Attributes:
        kernel: `phi`, float32 `[D E P/E]`.
        scale: float32 scalar, 1 at the start.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs, slots: int = 1):
        init = nnx.initializers.normal(width**-0.5)
        kernel = init(rngs.params(), (width, num_experts, slots), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("D", "E", None))
        self.scale = nnx.Param(jnp.ones((), jnp.float32), axes=())

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Returns the logits of experts, and `slot_logits [B S P]` behind them."""
        D, E, slots = self.kernel.shape
        phi = _unit(self.kernel[...].reshape(D, E * slots), axis=0)
        cosine = project(_unit(tokens.astype(jnp.float32), axis=-1), phi)
        slot_logits = self.scale[...] * cosine
        return Gated(expert_logits(slot_logits, E), {"slot_logits": slot_logits})


def _unit(x: Array, axis: int) -> Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=axis, keepdims=True) + _TINY)


def expert_logits(slot_logits: Float[Array, "B S P"], num_experts: int) -> Float[Array, "B S E"]:
    """The logsumexp over the slots of each expert: its softmax is the expert's share of a token."""
    B, S, P = slot_logits.shape
    return jax.nn.logsumexp(slot_logits.reshape(B, S, num_experts, P // num_experts), axis=-1)


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    slot_logits: Float[Array, "B S P"],
    *,
    k: int,
) -> Routing:
    """Mixes tokens into slots by a softmax over tokens, and back by a softmax over slots.

    Args:
        logits: float32 `[B S E]`, `expert_logits` of the next but one.
        valid: `[B S]`, True for a real token; padding enters no slot and takes nothing of any. The
            slots of a row without a token are empty: zeros.
        slot_logits: float32 `[B S P]`; slot p belongs to expert `p // (P / E)`.
        k: not used; the number of slots is the gate's.

    Returns:
        The decision; `probs` is the share of each expert in what a token takes.
    """
    del k
    real = valid[..., None]
    counted = real | ~real.any(axis=1, keepdims=True)  # a softmax over nothing would be NaN
    dispatch = jax.nn.softmax(jnp.where(counted, slot_logits, -jnp.inf), axis=1)
    combine = jnp.where(real, jax.nn.softmax(slot_logits), 0.0)
    return Routing(logits, jax.nn.softmax(logits), Mixing(jnp.where(real, dispatch, 0.0), combine))


def check(num_experts: int, *, k: int, slots: int = 1) -> None:
    """Refuses experts without a slot.

    Raises:
        ConfigError: fewer than one slot an expert.
    """
    del num_experts, k
    if slots < 1:
        raise ConfigError(
            f"router.slots={slots} must be at least 1: an expert without a slot sees nothing. "
            "data.sequence_length * router.k / model.num_experts slots cost as much as router.k "
            "experts a token."
        )


ROUTER = Router(
    route,
    paper="Puigcerver et al. 2024, arXiv:2308.00951",
    equation="l = scale x/|x| . phi/|phi|; D = softmax_t(l), C = softmax_p(l); y = C f(D^T x)",
    cost="D P + P expert rows a sequence, and 2 S P D for mixing",
    use="Encoders, vision and other tasks that see the whole row: no drops, no balance to keep.",
    check=check,
    gate=SoftGate,
    plan="mixing",
    causality="C3",
    causal_in_eval=False,
    fixed_k=False,
)
