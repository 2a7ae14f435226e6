"""The table of losses on routing: `losses.<name>` in the config is the weight of a row here.

A function takes what it names: `report` (stacked over layers), `total_tokens`, `total_rows` and
`global_counts` of the whole step, `k`, and for the losses that need more `kernels` (the gates' own,
`[L D E]`), `free` (which experts have no network, `[E]`), `token_cost` (each token's cross-entropy
`[B S]`, nats), `divergence` (between two passes, `[B S]`), `layer_terms` (what other layers than the
sparse ones report, `[B S]` by name) and `valid`. Parameters with a default are options, in the config
under `losses.<name>_<option>`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from moe.errors import ConfigError
from moe.routing import (
    entropy_losses,
    group_losses,
    importance_losses,
    level_losses,
    losses,
    orthogonality,
    policy_losses,
    sparsity_losses,
)
from moe.routing.router import parameters_of
from moe.routing.types import LayerReport, Scalar
from moe.routing.variable_k import ACTIVE

LOSS_INPUTS = frozenset(
    {
        *("report", "total_tokens", "total_rows", "global_counts", "k"),
        *("kernels", "free", "token_cost", "divergence", "layer_terms", "valid"),
    }
)


class Loss(NamedTuple):
    """One loss: unweighted, the mean over sparse layers."""

    function: Callable[..., Float[Array, ""]]
    paper: str
    terms: tuple[str, ...] = ()  # what it reads of a router's own terms
    always: bool = False  # computed and logged for every learned router, whatever its weight
    gated: bool = True  # about gates: a router that has none has nothing to lose

    @property
    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        found = parameters_of(self.function).items()
        return {n: p.default for n, p in found if n not in LOSS_INPUTS}


def layer_loss(name: str) -> Callable[..., Float[Array, ""]]:
    """The loss that is the mean over tokens of a term that layers report, mean over these layers."""

    def loss(layer_terms: Mapping[str, Array], *, total_tokens: Scalar) -> Float[Array, ""]:
        return layer_terms[name].sum() / jnp.maximum(total_tokens, 1)

    return loss


def consistency_loss(divergence: Float[Array, "B S"], *, total_tokens: Scalar) -> Float[Array, ""]:
    """Mean over tokens of the symmetric divergence of two passes, nats.

    THOR minimises CE1 + CE2 + alpha CR; here the cross-entropies are averaged, so the weight of this
    loss is alpha / 2.
    """
    return divergence.sum() / jnp.maximum(total_tokens, 1)


def heterogeneous_loss(
    report: LayerReport,
    free: Bool[Array, " E"],
    *,
    total_tokens: Scalar,
    global_counts: Shaped[Array, "L E"] | None = None,
    tau: float = 0.75,
    factor: float = 1.0,
) -> Float[Array, ""]:
    """Balance of unlike experts, with weight `tau` on those without a network."""
    eta = jnp.where(free, tau, 1.0)
    return sparsity_losses.heterogeneous_balance_loss(
        report, eta=eta, total_tokens=total_tokens, global_counts=global_counts, factor=factor
    )


LOSSES: dict[str, Loss] = {
    "balance": Loss(losses.balance_loss, "Fedus et al. 2022, arXiv:2101.03961", always=True),
    "sequence_balance": Loss(
        losses.sequence_balance_loss, "DeepSeek-AI 2024, arXiv:2412.19437", always=True
    ),
    "z": Loss(losses.z_loss, "Zoph et al. 2022, arXiv:2202.08906", always=True),
    "importance": Loss(
        importance_losses.importance_loss, "Shazeer et al. 2017, arXiv:1701.06538", ("importance",)
    ),
    "load": Loss(importance_losses.load_loss, "Shazeer et al. 2017, arXiv:1701.06538", ("load",)),
    "device_balance": Loss(
        group_losses.device_balance_loss, "DeepSeek-AI 2024, arXiv:2405.04434", ("groups_reached",)
    ),
    "communication_balance": Loss(
        group_losses.communication_balance_loss,
        "DeepSeek-AI 2024, arXiv:2405.04434",
        ("groups_reached",),
    ),
    "mutual_information": Loss(
        entropy_losses.mutual_information_loss, "Chen et al. 2022, arXiv:2212.08066"
    ),
    "entropy": Loss(entropy_losses.entropy_loss, "Shen et al. 2023, arXiv:2306.04640"),
    "modality_local": Loss(
        entropy_losses.modality_local_loss, "Mustafa et al. 2022, arXiv:2206.02770"
    ),
    "modality_global": Loss(
        entropy_losses.modality_global_loss, "Mustafa et al. 2022, arXiv:2206.02770"
    ),
    "simbal": Loss(orthogonality.simbal_loss, "Omi et al. 2025, arXiv:2506.14038"),
    "orthogonality": Loss(orthogonality.orthogonality_loss, "Baidu 2025, ERNIE 4.5 report"),
    "heterogeneous": Loss(heterogeneous_loss, "Jin et al. 2024, arXiv:2410.07348"),
    "relu_l1": Loss(
        sparsity_losses.relu_l1_loss,
        "Wang et al. 2025, arXiv:2412.14711",
        (sparsity_losses.RELU_L1,),
    ),
    "relu_balance": Loss(
        sparsity_losses.relu_balance_loss,
        "Wang et al. 2025, arXiv:2412.14711",
        (sparsity_losses.RELU_L1, sparsity_losses.RELU_LOAD),
    ),
    "selector_entropy": Loss(
        losses.term_loss("selector_entropy"),
        "Hazimeh et al. 2021, arXiv:2106.03760",
        ("selector_entropy",),
    ),
    "selector_outside": Loss(
        losses.term_loss("selector_outside"),
        "Hazimeh et al. 2021, arXiv:2106.03760",
        ("selector_outside",),
    ),
    "group_balance": Loss(
        level_losses.group_balance_loss,
        "He et al. 2022, arXiv:2212.05191",
        (level_losses.GROUP_PROBS,),
    ),
    "within_group_balance": Loss(
        level_losses.within_group_balance_loss,
        "He et al. 2022, arXiv:2212.05191",
        (level_losses.GROUP_PROBS, level_losses.WITHIN_PROBS),
    ),
    "consistency": Loss(consistency_loss, "Zuo et al. 2022, arXiv:2110.04260", gated=False),
    "policy": Loss(
        policy_losses.policy,
        "Williams 1992; Clark et al. 2022, arXiv:2202.01169",
        (policy_losses.LOG_PROB, policy_losses.BASELINE),
    ),
    "policy_entropy": Loss(
        policy_losses.policy_entropy,
        "Williams 1992; Clark et al. 2022, arXiv:2202.01169",
        (policy_losses.ENTROPY,),
    ),
    "compute": Loss(
        entropy_losses.compute_loss, "after Bengio et al. 2015, arXiv:1511.06297", (ACTIVE,)
    ),
    "predictor": Loss(
        layer_loss("predictor"), "Raposo et al. 2024, arXiv:2404.02258", ("predictor",), gated=False
    ),
    "commitment": Loss(
        layer_loss("commitment"), "Roy et al. 2021, arXiv:2003.05997", ("commitment",), gated=False
    ),
    "head_balance": Loss(
        layer_loss("head_balance"),
        "Zhang et al. 2022, arXiv:2210.05144",
        ("head_balance",),
        gated=False,
    ),
}


class Active(NamedTuple):
    """A loss that a run computes, with its options as pairs; hashable."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()


def active_losses(section: Mapping[str, Any], *, learned: bool) -> tuple[Active, ...]:
    """Returns the losses of a config section `losses`: those with a weight and those always logged.

    Args:
        section: weights and options by name.
        learned: whether there is a router with a gate.
    """
    found = []
    for name, loss in LOSSES.items():
        if loss.gated and not learned:
            continue
        if section[name] or loss.always:
            options = {n: section[f"{name}_{n}"] for n in loss.options}
            found.append(Active(name, tuple(options.items())))
    return tuple(found)


def compute(active: tuple[Active, ...], inputs: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
    """Computes losses, unweighted.

    Args:
        active: which, with options.
        inputs: what the functions may name, see above.
    """
    values = {}
    for name, options in active:
        function = LOSSES[name].function
        named = {n: v for n, v in inputs.items() if n in parameters_of(function)}
        values[name] = function(**named, **dict(options))
    return values


def check_terms(active: tuple[Active, ...], reported: set[str], router: str) -> None:
    """Refuses a loss that reads what the router does not report.

    Args:
        active: the losses of the run.
        reported: names of the router's terms.
        router: its name, for the message.

    Raises:
        ConfigError: names the loss and what is missing.
    """
    for name, _ in active:
        missing = set(LOSSES[name].terms) - reported
        if missing:
            raise ConfigError(
                f"losses.{name} has a weight, but router.name={router!r} does not report "
                f"{', '.join(sorted(missing))}, which that loss is made of: it would be silently "
                f"missing. Set losses.{name}=0.0, or choose a router that reports it."
            )
