"""The table of losses on routing: `losses.<name>` in the config is the weight of a row here.

A function takes what it names: `report` (stacked over layers), `total_tokens`, `total_rows` and
`global_counts` of the whole step, `k`, and for the losses that need more `kernels` (the gates' own,
`[L D E]`), `token_cost` (each token's cross-entropy `[B S]`, nats) and `valid`. Parameters with a
default are options, in the config under `losses.<name>_<option>`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from moe.errors import ConfigError
from moe.routing import losses
from moe.routing.router import parameters_of

LOSS_INPUTS = frozenset(
    {
        *("report", "total_tokens", "total_rows", "global_counts", "k"),
        *("kernels", "token_cost", "valid"),
    }
)


class Loss(NamedTuple):
    """One loss: unweighted, the mean over sparse layers."""

    function: Callable[..., Float[Array, ""]]
    paper: str
    terms: tuple[str, ...] = ()  # what it reads of a router's own terms
    always: bool = False  # computed and logged for every learned router, whatever its weight

    @property
    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        found = parameters_of(self.function).items()
        return {n: p.default for n, p in found if n not in LOSS_INPUTS}


LOSSES: dict[str, Loss] = {
    "balance": Loss(losses.balance_loss, "Fedus et al. 2022, arXiv:2101.03961", always=True),
    "sequence_balance": Loss(
        losses.sequence_balance_loss, "DeepSeek-AI 2024, arXiv:2412.19437", always=True
    ),
    "z": Loss(losses.z_loss, "Zoph et al. 2022, arXiv:2202.08906", always=True),
}


class Active(NamedTuple):
    """A loss that a run computes, with its options as pairs; hashable."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()


def active_losses(section: Mapping[str, Any], *, learned: bool) -> tuple[Active, ...]:
    """Returns the losses of a config section `losses`: those with a weight and those always logged.

    Args:
        section: weights and options by name.
        learned: whether the router has a gate; without one there is nothing to lose on routing.
    """
    if not learned:
        return ()
    found = []
    for name, loss in LOSSES.items():
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
