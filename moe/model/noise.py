"""Noise on the weights of a router's gate or of the experts, in training (Graves 2011; arXiv:1706.10295)."""

from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Shaped

from moe.errors import ConfigError
from moe.routing.weight_noise import MODES, Sigmas, perturb

TARGETS = ("none", "gate", "experts")


class WeightNoise(NamedTuple):
    """The section `weight_noise` of the config."""

    target: str = "none"
    mode: str = "relative"
    scale: float = 0.1


class Noisy(nnx.Module):
    """Hands out a module with noisy parameters: one draw for each layer and pass.

    Attributes:
        sigmas: learned sizes of the noise, for the modes `learned` and `factorised`.
    """

    def __init__(self, noise: WeightNoise, module: nnx.Module, *, stacked: int):
        """`stacked` axes in front of each parameter count matrices: 1 for experts, 0 for a gate."""
        self.noise, self.stacked = noise, stacked
        if noise.mode in ("learned", "factorised"):
            params = nnx.to_flat_state(nnx.state(module, nnx.Param))
            self.sigmas = Sigmas({_name(path): p for path, p in params}, stacked=stacked)

    def __call__(self, module: Any, key: Shaped[Array, ""] | None) -> Any:
        """The module with noise; `module` itself without a key, as in evaluation."""
        if key is None:
            return module
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        flat = nnx.to_flat_state(params)
        values = {_name(path): variable.get_value() for path, variable in flat}
        sigma = self.sigmas() if hasattr(self, "sigmas") else None
        noisy = perturb(values, key, self.noise.mode, self.noise.scale, sigma, stacked=self.stacked)
        drawn = [(path, variable.replace(noisy[_name(path)])) for path, variable in flat]
        return nnx.merge(graph, nnx.from_flat_state(drawn), rest)


def _name(path: tuple) -> str:
    return "_".join(map(str, path))


def check(*, target: str, mode: str, scale: float, learned: bool, sparse: bool) -> None:
    """Refuses unknown names, negative noise, and noise on what is not there.

    Args:
        target: one of `TARGETS`.
        mode: of `moe.routing.weight_noise`.
        scale: of the noise.
        learned: whether the router has a gate.
        sparse: whether there are experts.

    Raises:
        ConfigError: see the messages.
    """
    for key, value, known in (("target", target, TARGETS), ("mode", mode, MODES)):
        if value not in known:
            raise ConfigError(
                f"weight_noise.{key}={value!r} is not one of {', '.join(known)}; choose one."
            )
    if scale < 0:
        raise ConfigError(f"weight_noise.scale={scale} must be at least 0; 0 is no noise.")
    if target != "none" and not sparse:
        raise ConfigError(
            f"weight_noise.target={target!r} in a model without sparse layers: there is neither gate nor "
            "expert. Set weight_noise.target='none', or model.pattern with sparse layers."
        )
    if target == "gate" and not learned:
        raise ConfigError(
            "weight_noise.target='gate' with a router that has no gate: nothing would be noisy. Choose "
            "target='experts', or a router with a gate."
        )
