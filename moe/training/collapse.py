"""Says when routing has collapsed: most experts of a layer idle, or one with most of the tokens."""

from collections.abc import Mapping
from typing import Any

from moe.config import ConfigDict

ADVICE = (
    "Raise the weight of the loss that balances this router (losses.balance, or losses.sequence_balance, "
    "losses.importance with losses.load, losses.mutual_information, losses.simbal), or router.bias_rate of a "
    "router with a bias; raise losses.z if logits grow; lower optimizer.learning_rate or lengthen "
    "optimizer.warmup_steps if it began early. Idle experts seldom come back by themselves: a start "
    "from an older checkpoint is cheaper than to wait."
)


class Watch:
    """Looks at every evaluation of a run and speaks after several bad ones in a row.

    Args:
        limits: `config.guards`.
    """

    def __init__(self, limits: ConfigDict):
        self._limits = limits
        self._in_a_row = 0

    def look(self, metrics: Mapping[str, Any]) -> str | None:
        """Takes note of one evaluation.

        Args:
            metrics: of the evaluation, as `moe.routing.metrics.summarize` names them; those of a
                dense model have no routing and are passed over.

        Returns:
            What is wrong in the worst layer, with advice, at every `evaluations`-th in a row beyond a
            bound; else None.
        """
        if "routing/load" not in metrics:
            return None
        found = [self._idle(metrics), self._crowded(metrics)]
        beyond = [text for text in found if text is not None]
        self._in_a_row = self._in_a_row + 1 if beyond else 0
        if not beyond or self._in_a_row % self._limits.evaluations:
            return None
        return (
            f"Routing collapses: {' and '.join(beyond)}, beyond a bound in {self._in_a_row} evaluations in a "
            f"row. {ADVICE}"
        )

    def _idle(self, metrics: Mapping[str, Any]) -> str | None:
        experts = [len(load) for load in metrics["routing/load"]]
        dead = metrics["routing/per_layer/dead_experts"]
        layer = max(range(len(dead)), key=lambda i: dead[i] / experts[i])
        if dead[layer] / experts[layer] <= self._limits.dead_experts:
            return None
        return (
            f"{dead[layer]:.0f} of {experts[layer]} experts of sparse layer {layer} get next to no token "
            f"(guards.dead_experts={self._limits.dead_experts})"
        )

    def _crowded(self, metrics: Mapping[str, Any]) -> str | None:
        violation = metrics["routing/per_layer/max_violation"]
        layer = max(range(len(violation)), key=lambda i: violation[i])
        if violation[layer] <= self._limits.violation:
            return None
        return (
            f"one expert of sparse layer {layer} gets {violation[layer] + 1:.1f} times its fair share "
            f"(guards.violation={self._limits.violation})"
        )
