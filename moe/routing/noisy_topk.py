"""Noisy top-k gating: noise that a token's gate scales, and a load that it makes differentiable.

Shazeer et al. 2017 (arXiv:1701.06538), section 2.1 and appendix A; the variant with fixed noise is
V-MoE's, Riquelme et al. 2021 (arXiv:2106.05974), section 2 and appendix A.

| option | Shazeer | V-MoE |
|---|---|---|
| `noise` | `learned`: softplus(x W_noise) + 1e-2 | `fixed`: 1/E |
| `normalize` | `topk_softmax`: softmax of the K chosen noisy logits | `none`: their softmax over all E |
| importance | sum of gates | sum of `softmax(x W)`, noise-free, over all E |
| `load_threshold` | `paper`: K-th largest of the other noisy logits | `vmoe`: K-th largest of all |

The `vmoe` threshold of a chosen expert is at most its own noisy logit, not the best of the losers:
it understates the chance of experts that are chosen anyway.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moe.errors import ConfigError
from moe.routing.gates import Gated, project
from moe.routing.router import Router
from moe.routing.selection import choices, gather, select
from moe.routing.types import Routing, Scalar

NOISE = ("learned", "fixed")
INIT = ("zeros", "normal")
NORMALIZE = ("topk_softmax", "none")
THRESHOLDS = ("paper", "vmoe")

LEAST_NOISE = 1e-2  # of the learned scale, so that training always explores


class NoisyGate(nnx.Module):
    """Clean logits `x W_g` and a noise scale for each of them.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws `W_g` when `init` is `normal`.
        noise: `learned` has a second kernel, the scale is `softplus(x W_noise) + 1e-2`; `fixed`
            has none, the scale is 1/E.
        init: `zeros` is the paper's: at the start noise alone decides, so that the load is equal
            in training; evaluation of an untrained gate ties and takes experts 0 to K-1.
            `normal` draws `W_g` from normal(0, D^-1/2). `W_noise` starts at zero in both.

    Attributes:
        kernel: `W_g`, float32 `[D E]`.
        noise_kernel: `W_noise`, float32 `[D E]`, if the noise is learned.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        noise: str = "learned",
        init: str = "zeros",
    ):
        shape, axes = (width, num_experts), ("D", "E")
        draw = nnx.initializers.zeros if init == "zeros" else nnx.initializers.normal(width**-0.5)
        self.kernel = nnx.Param(draw(rngs.params(), shape, jnp.float32), axes=axes)
        if noise == "learned":
            self.noise_kernel = nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Clean logits, and `noise_scale` `[B S E]`, both float32."""
        logits = project(tokens, self.kernel[...])
        if hasattr(self, "noise_kernel"):
            scale = jax.nn.softplus(project(tokens, self.noise_kernel[...])) + LEAST_NOISE
        else:
            scale = jnp.full_like(logits, 1.0 / logits.shape[-1])
        return Gated(logits, {"noise_scale": scale})


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    noise_scale: Float[Array, "B S E"],
    key: PRNGKeyArray | None = None,
    noise_std: Scalar = 1.0,
    normalize: str = "topk_softmax",
    load_threshold: str = "paper",
) -> Routing:
    """Sends each token to the `k` largest of `H = logits + normal * noise_std * noise_scale`.

    Args:
        logits: clean, float32 `[B S E]`.
        valid: `[B S]`, True for a real token.
        k: experts a token, fewer than E.
        noise_scale: `[B S E]`, positive, from the gate.
        key: None, as in evaluation, stands for no noise.
        noise_std: multiplies the noise; may be traced; 0 equals no noise.
        normalize: one of `NORMALIZE`, see the table above.
        load_threshold: one of `THRESHOLDS`, see the table above.

    Returns:
        The decision; `probs` is the softmax of the clean logits. Its terms, both differentiable
        and `[B S E]`: `importance`, and `load`, the probability that the expert is chosen when
        its own noise alone is drawn again.
    """
    scale = noise_std * noise_scale
    noisy = logits
    if key is not None:
        noisy = logits + scale * jax.random.normal(key, logits.shape, logits.dtype)
    best = select(noisy, k + 1)
    expert = best[..., :k]
    probs = jax.nn.softmax(logits)
    if normalize == "topk_softmax":
        gate = jax.nn.softmax(gather(noisy, expert))
        importance = _scatter(gate, expert, logits.shape[-1])
    else:
        gate, importance = gather(jax.nn.softmax(noisy), expert), probs
    load = _load(logits, noisy, best, scale, load_threshold)
    terms = {"importance": importance, "load": load}
    return Routing(logits, probs, choices(expert, gate, valid), terms)


def _scatter(gate: Float[Array, "B S K"], expert: Array, num_experts: int) -> Array:
    """`[B S E]`: each expert's gate, 0 where it was not chosen."""
    return (jax.nn.one_hot(expert, num_experts) * gate[..., None]).sum(axis=-2)


def _load(
    logits: Float[Array, "B S E"],
    noisy: Float[Array, "B S E"],
    best: Array,
    scale: Float[Array, "B S E"],
    threshold: str,
) -> Float[Array, "B S E"]:
    """`Phi((logits - threshold) / scale)` (Shazeer et al., appendix A).

    The K-th largest of the other noisy logits is the (K+1)-th of all for a chosen expert and the
    K-th of all for another. Thresholds and logits are both before any softmax.

    Args:
        logits: clean.
        noisy: what was chosen by.
        best: `[B S K+1]`, the experts of the K + 1 largest noisy logits, best first.
        scale: of the noise; a vanishing one makes a step of the probability.
        threshold: one of `THRESHOLDS`.
    """
    k = best.shape[-1] - 1
    border = gather(noisy, best[..., k - 1 :])  # [B S 2]: K-th and (K+1)-th
    bar = border[..., :1]
    if threshold == "paper":
        chosen = jax.nn.one_hot(best[..., :k], logits.shape[-1], dtype=bool).any(axis=-2)
        bar = jnp.where(chosen, border[..., 1:], bar)
    return jax.scipy.special.ndtr((logits - bar) / jnp.maximum(scale, 1e-6))


def check(
    num_experts: int,
    *,
    k: int,
    noise: str = "learned",
    init: str = "zeros",
    noise_std: float = 1.0,
    normalize: str = "topk_softmax",
    load_threshold: str = "paper",
) -> None:
    """Refuses options that cannot work or cannot train.

    Raises:
        ConfigError: an unknown option, k = E, one gate that is always 1, or a zero gate without
            noise.
    """
    for name, value, known in (
        ("noise", noise, NOISE),
        ("init", init, INIT),
        ("normalize", normalize, NORMALIZE),
        ("load_threshold", load_threshold, THRESHOLDS),
    ):
        if value not in known:
            raise ConfigError(
                f"router.{name}={value!r} is not one of {', '.join(known)}; choose one."
            )
    if k >= num_experts:
        raise ConfigError(
            f"router.k={k} with router.name='noisy_topk' must be below model.num_experts="
            f"{num_experts}: the load compares a logit with that of rank k + 1. Lower router.k, or "
            "use router.name='topk'."
        )
    if k == 1 and normalize == "topk_softmax":
        raise ConfigError(
            "router.k=1 with router.normalize='topk_softmax': the softmax of a single logit is "
            "always 1, so the router would get no gradient from the task. Set "
            "router.normalize='none' or router.k=2 or more."
        )
    if noise_std < 0 or (noise_std == 0 and init == "zeros"):
        raise ConfigError(
            f"router.noise_std={noise_std} with router.init={init!r}: it must not be negative, and "
            "a gate that starts at zero needs noise, or every token goes to the experts of the "
            "lowest numbers. Set router.noise_std=1.0 or router.init='normal'."
        )


ROUTER = Router(
    route,
    paper="Shazeer et al. 2017, arXiv:1701.06538; Riquelme et al. 2021, arXiv:2106.05974",
    equation="H = x W_g + normal * (softplus(x W_noise) + 0.01), gate = softmax of the top-k of H",
    cost="2 D E + k experts",
    use="Exploration by learned noise, balanced by importance and a differentiable load.",
    check=check,
    gate=NoisyGate,
    traced=("noise_std",),
)
