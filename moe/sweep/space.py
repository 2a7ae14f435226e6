"""A sweep as plain data: what is searched, how, and the points that are known in advance."""

from collections.abc import Mapping
import itertools
import json
from typing import Any, NamedTuple

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from moe.errors import ConfigError

SAMPLERS = ("grid", "random", "tpe")
PRUNERS = ("none", "median", "hyperband")
DIRECTIONS = ("minimize", "maximize")

Params = dict[str, Any]


class Sweep(NamedTuple):
    """A checked sweep file.

    Attributes:
        name: of the study.
        base: `--config` of every run.
        overrides: dotted key -> text, for every run.
        space: dotted key -> Optuna distribution, in the order of the file.
        sampler: one of `SAMPLERS`.
        points: how many points are tried.
        pruner: one of `PRUNERS`.
        seeds: `--config.seed` of the runs of every point; pruning looks at the first.
        metric: key of metrics.jsonl.
        split: of the lines the metric is read from.
        direction: one of `DIRECTIONS`.
        sampler_seed: of random and TPE.
        steps: of the base config, for Hyperband's brackets.
        evaluate_every: steps between values of the metric.
    """

    name: str
    base: str
    overrides: Mapping[str, str]
    space: Mapping[str, BaseDistribution]
    sampler: str
    points: int
    pruner: str
    seeds: tuple[int, ...]
    metric: str
    split: str
    direction: str
    sampler_seed: int
    steps: int
    evaluate_every: int

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same when a sweep continues; the number of points may grow."""
        return {
            "base": self.base,
            "overrides": dict(self.overrides),
            "space": {key: json.loads(distribution_to_json(d)) for key, d in self.space.items()},
            "sampler": self.sampler,
            "sampler_seed": self.sampler_seed,
            "pruner": self.pruner,
            "seeds": list(self.seeds),
            "metric": self.metric,
            "split": self.split,
            "direction": self.direction,
        }

    def to_json(self) -> str:
        """All of it as text, for worker processes."""
        space = {key: distribution_to_json(d) for key, d in self.space.items()}
        return json.dumps(self._replace(space=space)._asdict())  # ty: ignore[invalid-argument-type]

    @staticmethod
    def from_json(text: str) -> "Sweep":
        """The sweep that `to_json` wrote."""
        given = json.loads(text)
        space = {key: json_to_distribution(d) for key, d in given["space"].items()}
        return Sweep(**given | {"space": space, "seeds": tuple(given["seeds"])})


def fixed_points(sweep: Sweep) -> list[Params]:
    """The points that are known before any result: all of a grid, the draws of `random`, none of TPE.

    The first n points do not depend on how many follow, so that a sweep can be made longer.
    """
    if sweep.sampler == "grid":
        values = [grid_values(key, d) for key, d in sweep.space.items()]
        return [dict(zip(sweep.space, point, strict=True)) for point in itertools.product(*values)]
    if sweep.sampler == "random":
        sampler = optuna.samplers.RandomSampler(seed=sweep.sampler_seed)
        draws = optuna.create_study(sampler=sampler)
        return [draws.ask(dict(sweep.space)).params for _ in range(sweep.points)]
    return [{} for _ in range(sweep.points)]


LARGEST_GRID = 100_000  # values of one key


def grid_values(key: str, distribution: BaseDistribution) -> list[Any]:
    """All values of a key, in order.

    Raises:
        ConfigError: a range without a step has no grid.
    """
    ranged = isinstance(distribution, IntDistribution | FloatDistribution)
    step = distribution.step if ranged else None
    if ranged and step and (distribution.high - distribution.low) / step > LARGEST_GRID:
        raise ConfigError(
            f"space[{key!r}] has more than {LARGEST_GRID} values from {distribution.low} to "
            f"{distribution.high} in steps of {step}: take a larger step, or sampler='random' or 'tpe'."
        )
    match distribution:
        case CategoricalDistribution(choices=choices):
            return list(choices)
        case IntDistribution(log=False):
            return list(range(distribution.low, distribution.high + 1, distribution.step))
        case FloatDistribution(step=float() as step):
            count = round((distribution.high - distribution.low) / step) + 1
            return [float(f"{distribution.low + i * step:.12g}") for i in range(count)]
    raise ConfigError(
        f"space[{key!r}] is a range without a step, which no grid can go through: give its values or a "
        "step, or set sampler='random' or 'tpe'."
    )


def to_text(value: Any) -> str:
    """A value as `--config.key=` takes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)
