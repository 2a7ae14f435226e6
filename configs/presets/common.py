"""What the presets of routers are made with."""

from typing import Any, NamedTuple

from moe.routing.loss_table import LOSSES

Sections = dict[str, dict[str, Any]]


class Size(NamedTuple):
    """What a preset is fitted to; the defaults are those of configs/quickstart.py."""

    num_experts: int = 16
    k: int = 4
    sequence_length: int = 256
    steps: int = 200


def preset(name: str, router: dict[str, Any], **losses: Any) -> Sections:
    """Sections of a preset; a loss that is not named has weight 0."""
    zeros = dict.fromkeys(LOSSES, 0.0)
    return {"router": {"name": name, "jitter": 0.0, **router}, "losses": {**zeros, **losses}}


def divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(d for d in range(1, most + 1) if number % d == 0)
