"""What fixed sizes waste: slots that stay empty, choices that find none, rows that fill up a tile."""

import math
from typing import NamedTuple

from scipy import stats

from moe import setup


class Waste(NamedTuple):
    """Expected at a router that chooses at random and evenly; a skewed one drops more."""

    what: str
    drops: float  # share of the choices that find no slot
    padding: float  # share of the rows computed that hold no choice


def expected_waste(run: setup.Run, tokens: int) -> Waste | None:
    """Of the dispatch in training; None where nothing has a fixed size.

    Args:
        run: the planned run.
        tokens: of the global batch.
    """
    d, spec = run.config.dispatch, run.spec
    if not spec.sparse_layers or spec.router.row.plan != "choices":
        return None
    if d.name in ("capacity", "einsum") and d.capacity_factor is not None:
        group = d.group or run.config.data.sequence_length
        choices = group * spec.router.k
        slots = min(math.ceil(d.capacity_factor * choices / spec.num_experts), group)
        what = f"{slots} slots an expert for each group of {group} positions"
        return _binomial(what, choices, 1 / spec.num_experts, slots)
    if d.name == "grouped" and d.buffer_factor is not None:
        n = math.prod(run.mesh.shape[axis] for axis in run.rules.expert_axes)
        if n == 1:
            return None
        local = tokens * run.mesh.shape["tensor"] // run.mesh.size
        choices = local * spec.router.k * n  # of all that send to one shard
        slots = math.ceil(d.buffer_factor * choices / n)
        return _binomial(f"{slots} rows a shard of the exchange can receive", choices, 1 / n, slots)
    return None


def _binomial(what: str, choices: int, share: float, slots: int) -> Waste:
    """Expected overflow and emptiness of `slots` places for `Binomial(choices, share)` arrivals.

    `E[max(X - c, 0)] = n p P(X' >= c) - c P(X > c)` with `X'` of one trial less.
    """
    mean = choices * share
    over = mean * stats.binom.sf(slots - 1, choices - 1, share) - slots * stats.binom.sf(
        slots, choices, share
    )
    over = max(float(over), 0.0)
    return Waste(what, over / mean, 1 - (mean - over) / slots)
