"""Ranges of numeric options that mean the same in every router that has them."""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

from moe.errors import ConfigError


class Rule(NamedTuple):
    """What an option may be."""

    allows: Callable[[float], bool]
    rule: str  # completes "router.x=... "
    fix: str


RULES: dict[str, Rule] = {
    "scale": Rule(
        lambda v: v > 0,
        "must be above 0: it multiplies the gates, and experts behind gates of 0 learn nothing",
        "The default is 1.0",
    ),
    "bias_rate": Rule(
        lambda v: v >= 0,
        "must not be negative: the bias would favour the experts that have most already",
        "DeepSeek-V3 uses 0.001, and 0.0 to hold the bias still",
    ),
    "bias_centering": Rule(
        lambda v: 0 <= v <= 1,
        "must be between 0 and 1: it is the share of its mean that is taken off the bias",
        "Set 0.0 or 1.0",
    ),
    "decay": Rule(
        lambda v: 0 <= v < 1,
        "must be at least 0 and below 1: it is the weight of the past in a running mean",
        "The default is 0.99",
    ),
    "baseline_decay": Rule(
        lambda v: 0 <= v < 1,
        "must be at least 0 and below 1: it is the weight of the past in a running mean of the cost",
        "The default is 0.99",
    ),
    "baseline_hidden": Rule(
        lambda v: v >= 0,
        "must not be negative: it is the hidden width of the learned baseline",
        "0 stands for model.width",
    ),
    "noise": Rule(
        lambda v: v >= 0,
        "must not be negative: it multiplies the noise",
        "1.0 samples from the softmax, 0.0 takes the largest logits",
    ),
    "prior_weight": Rule(
        lambda v: v >= 0,
        "must be at least 0: a negative weight would send tokens to the modules that did worst",
        "Set 0.0 to ignore the prior",
    ),
    "length": Rule(
        lambda v: v >= 0,
        "must not be negative: it is a number of positions",
        "Set data.sequence_length, or 0 where blocks are not used",
    ),
}


def check_numbers(options: Mapping[str, Any]) -> None:
    """Refuses numbers that are not finite or outside the range of `RULES`.

    Args:
        options: of a router, by name; those that are no numbers are left to its own check.

    Raises:
        ConfigError: names option, value, rule and fix.
    """
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise ConfigError(
                f"router.{name}={value} is not a finite number, and no router can compute with it. "
                f"Set router.{name} to a number."
            )
        rule = RULES.get(name)
        if rule is not None and not rule.allows(value):
            raise ConfigError(f"router.{name}={value} {rule.rule}. {rule.fix}.")
