"""Weights perturbed with noise: `W' = W + sigma * eps`, drawn anew for every pass of training.

Graves 2011 (variational weight noise), Fortunato et al. 2018 (NoisyNets, arXiv:1706.10295); kin to
DropConnect (Wan et al. 2013).

| mode | `sigma * eps` | |
|---|---|---|
| `literal` | `scale * N(0, 1)` | a baseline only |
| `relative` | `scale * std(W) * N(0, 1)`, std of each matrix | scale 0.01 to 0.1 |
| `learned` | `scale * sigma_ij * N(0, 1)` | NoisyNets with independent noise |
| `factorised` | `scale * sigma_ij * f(a_i) f(b_j)`, a and b N(0, 1) | NoisyNets |

with `f(x) = sign(x) sqrt(abs(x))`. The paper's scale is 1 for the last two, whose sigma starts at
`0.5 D^-1/2`.

Weights are drawn at a scale of D^-1/2, so literal noise of scale 1 is D^1/2 times the weights and
drowns them: training diverges or learns nothing. No mode cures vanishing gradients; noise explores.
"""

import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moe.errors import ConfigError
from moe.routing import topk
from moe.routing.gates import Gated, project
from moe.routing.router import Router
from moe.routing.types import Scalar

MODES = ("literal", "relative", "learned", "factorised")


def perturb(
    tree: Any,
    key: PRNGKeyArray | None,
    mode: str,
    scale: Scalar = 1.0,
    sigma: Any = None,
    *,
    stacked: int = 0,
) -> Any:
    """Adds noise to every array of a tree; the gradient with respect to `tree` passes unchanged.

    The caller says how long a draw lasts by the key: one for each call, or one for each optimiser
    step, which its microbatches and layers' recomputations then share.

    Args:
        tree: float arrays `[in, out ...]`, behind `stacked` axes. A vector counts as one row.
        key: of the draw; None, as in evaluation, returns `tree` itself.
        mode: one of `MODES`.
        scale: size of the noise, see the table above; may be traced; 0 is the identity.
        sigma: a tree of the same structure for `learned` and `factorised`, with its gradient;
            `factorised` without it takes the standard deviation of each matrix.
        stacked: axes in front that count matrices of their own: 0 for a gate, 1 for experts
            (`[E D F]`, `[E D P F]`), one more for stacked layers.

    Returns:
        The noisy tree, in the types of `tree`.

    Raises:
        ValueError: an unknown mode, or `learned` without `sigma`.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    if mode == "learned" and sigma is None:
        raise ValueError("mode='learned' needs sigma: a tree like the one to perturb")
    if key is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    given = [None] * len(leaves) if sigma is None else structure.flatten_up_to(sigma)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        _noisy(w, s, k, mode, scale, stacked) for w, s, k in zip(leaves, given, keys, strict=True)
    )


def _noisy(
    weight: Array, sigma: Array | None, key: PRNGKeyArray, mode: str, scale: Scalar, stacked: int
) -> Array:
    """One array with its noise, computed in float32."""
    exact = weight.astype(jnp.float32)
    if mode == "literal":
        sigma = jnp.ones(())
    elif sigma is None or mode == "relative":
        axes = tuple(range(stacked, weight.ndim))
        sigma = jax.lax.stop_gradient(exact.std(axis=axes, keepdims=True))
    if mode == "factorised":
        noise = factorised_noise(key, weight.shape, stacked)
    else:
        noise = jax.random.normal(key, weight.shape)
    return (exact + scale * sigma * noise).astype(weight.dtype)


def factorised_noise(key: PRNGKeyArray, shape: tuple[int, ...], stacked: int = 0) -> Array:
    """`f(a_i) f(b_j)` for matrices `[in, out ...]`: in + out draws in place of in * out.

    Mean 0 and variance 2/pi; entries of a row or of a column are not independent.
    """
    front = shape[:stacked]
    inputs, outputs = _matrix(shape, stacked)
    rows, columns = jax.random.split(key)
    a = jax.random.normal(rows, (*front, inputs, 1))
    b = jax.random.normal(columns, (*front, 1, outputs))
    a, b = (jnp.sign(x) * jnp.sqrt(jnp.abs(x)) for x in (a, b))
    return (a * b).reshape(shape)


def initial_sigma(shape: tuple[int, ...], stacked: int = 0) -> Array:
    """NoisyNets' start: `0.5 / sqrt(fan_in)` everywhere (section 3.2, factorised)."""
    return jnp.full(shape, 0.5 * _matrix(shape, stacked)[0] ** -0.5)


def _matrix(shape: tuple[int, ...], stacked: int) -> tuple[int, int]:
    """Inputs and outputs of an array's matrices; a vector is one row."""
    own = shape[stacked:]
    inputs = own[0] if len(own) > 1 else 1
    return inputs, math.prod(own) // inputs


class Sigmas(nnx.Module):
    """Learned sizes of noise, one for each number of each weight.

    Args:
        weights: the parameters that noise is added to, by name; each sigma gets its axes.
        stacked: as for `perturb`.

    Attributes:
        sigma: float32 parameters by the same names.
    """

    def __init__(self, weights: dict[str, nnx.Param], *, stacked: int = 0):
        self.sigma = nnx.Dict(
            {
                name: nnx.Param(initial_sigma(weight[...].shape, stacked), **weight.get_metadata())
                for name, weight in weights.items()
            }
        )

    def __call__(self) -> dict[str, Array]:
        """Returns the sigmas as `perturb` takes them."""
        return {name: sigma[...] for name, sigma in self.sigma.items()}


class NoisyGate(nnx.Module):
    """A linear gate whose kernel is perturbed in training: choices explore together, not each alone.

    One draw holds for all tokens of a pass. Experts' weights are not touched.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws the kernel from normal(0, D^-1/2).
        noise_mode: one of `MODES`.
        noise_scale: see the table of this file.

    Attributes:
        kernel: float32 `[D E]`.
        sigmas: for the modes `learned` and `factorised`.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        noise_mode: str = "relative",
        noise_scale: float = 0.1,
    ):
        init = nnx.initializers.normal(width**-0.5)
        kernel = init(rngs.params(), (width, num_experts), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("D", "E"))
        self.noise_mode, self.noise_scale = noise_mode, noise_scale
        if noise_mode in ("learned", "factorised"):
            self.sigmas = Sigmas({"kernel": self.kernel})

    def __call__(self, tokens: Float[Array, "B S D"], *, key: PRNGKeyArray | None = None) -> Gated:
        """Scores every expert for every token; without a key, as in evaluation, without noise."""
        sigma = self.sigmas() if hasattr(self, "sigmas") else None
        clean = {"kernel": self.kernel[...]}
        noisy = perturb(clean, key, self.noise_mode, self.noise_scale, sigma)
        return Gated(project(tokens, noisy["kernel"]))


def check(
    num_experts: int,
    *,
    k: int,
    normalize: str = "renormalize",
    score: str = "softmax",
    noise_mode: str = "relative",
    noise_scale: float = 0.1,
) -> None:
    """Refuses what top-k refuses, unknown modes and negative noise.

    Raises:
        ConfigError: see the messages.
    """
    topk.check(num_experts, k=k, normalize=normalize, score=score)
    if noise_mode not in MODES:
        raise ConfigError(
            f"router.noise_mode={noise_mode!r} is not one of {', '.join(MODES)}; choose one."
        )
    if noise_scale < 0:
        raise ConfigError(
            f"router.noise_scale={noise_scale} must be at least 0; 0 is router.name='topk'."
        )


ROUTER = Router(
    topk.route,
    paper="Fortunato et al. 2018, arXiv:1706.10295; Graves 2011",
    equation="top-k of x (W + sigma * eps), one eps a pass, in training only",
    cost="as top-k, and D E random numbers a pass (D + E if factorised)",
    use="To explore with whole tokens moving together, instead of noise for each token.",
    check=check,
    gate=NoisyGate,
)
