"""What fixed sizes waste: slots that stay empty, choices that find none, rows that fill up a tile."""

import math
from typing import NamedTuple

from scipy import stats

from moe import setup
from moe.dispatch import gpu_tiles, tpu_tiles
from moe.dispatch.capacity import slots
from moe.dispatch.grouped_matmul import default_backend
from moe.dispatch.table import Exchange, has_ragged_all_to_all


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
    K, E = spec.router.k, spec.all_experts
    if d.name in ("capacity", "einsum") and d.capacity_factor is not None:
        S = run.config.data.sequence_length
        group = min(d.group or S, S)
        C = slots(d.capacity_factor, group, K, E, d.capacity_multiple)
        return overflow(
            f"{C} slots an expert for each group of {group} positions", group, K, E, E, C
        )
    if d.name == "grouped" and d.buffer_factor is not None:
        return _of_exchange(run, local_tokens(run, tokens))
    return None


def _of_exchange(run: setup.Run, local: int) -> Waste | None:
    """Of the buffer that one shard receives into: one for all senders, or a part for each."""
    K, E = run.spec.router.k, run.spec.all_experts
    factor, n = run.config.dispatch.buffer_factor, run.rules.expert_shards(run.mesh)
    exchange = resolved_exchange(run)
    if exchange == "ragged":
        rows = min(math.ceil(factor * local * K), n * local * K)
        what = f"{rows} rows that a shard of the exchange can receive"
        return overflow(what, local * n, K, E, n, rows)
    if exchange == "all_to_all":
        rows = min(math.ceil(factor * local * K / n), local * K)
        what = f"{rows} rows that a shard of the exchange can receive from each of {n}"
        return overflow(what, local, K, E, n, rows)
    return None


def resolved_exchange(run: setup.Run) -> str:
    """The exchange that the dispatch uses on this mesh; `none` where experts lie on one shard."""
    d, first = run.config.dispatch, run.mesh.devices.flat[0]
    native = has_ragged_all_to_all(first.platform, first.device_kind, run.mesh.size)
    how = Exchange(d.exchange, d.buffer_factor, first.platform, native, run.rules.expert_axes)
    return how.resolved(d.name, run.rules.expert_shards(run.mesh), run.spec.router.k)


def local_tokens(run: setup.Run, tokens: int) -> int:
    """Tokens that one device dispatches at a time, of `tokens` of the global batch."""
    at_once = tokens // run.config.optimizer.accumulation // run.config.dispatch.chunks
    return at_once * run.mesh.shape["tensor"] // run.mesh.size


def overflow(what: str, T: int, K: int, E: int, parts: int, places: int) -> Waste:
    """Expected overflow and emptiness of the `places` rows of one of `parts` equal parts of `E` experts.

    `T` tokens choose `K` different experts each. With one expert a part the arrivals are
    `Binomial(T, K / E)`; with more they vary less than `Binomial(T K, 1 / parts)` and less than
    `Binomial(T E / parts, K / E)`, so the narrower of the two overstates the drops a little.
    `E[max(X - c, 0)] = m p P(X' >= c) - c P(X > c)` for `X` of `m` trials and `X'` of one less.
    """
    share = max(1 / parts, K / E)
    mean = T * K / parts
    trials = round(mean / share)
    over = mean * stats.binom.sf(places - 1, trials - 1, share)
    over -= places * stats.binom.sf(places, trials, share)
    over = min(max(float(over), 0.0), mean)
    return Waste(what, over / mean, 1 - (mean - over) / places)


def tile_padding(run: setup.Run, rows: int, even: int) -> float:
    """Rows that a grouped kernel multiplies beyond its own, over its own, at random group sizes.

    On TPU a step of rows is multiplied once for every group that has one there: a group that begins
    anywhere in a step touches one step more than it fills, but the first begins at its start. On GPU
    the last tile of each group is half empty.

    Args:
        run: the planned run.
        rows: of the kernel's buffer.
        even: of them filled at even load.
    """
    groups = run.spec.num_experts // run.rules.expert_shards(run.mesh)
    platform, backend = run.mesh.devices.flat[0].platform, run.config.dispatch.backend
    backend = default_backend(platform) if backend == "auto" else backend
    if backend == "triton":
        itemsize = 2 if run.spec.dtype == "bfloat16" else 4
        tile = gpu_tiles.product_tiles(rows, groups, run.spec.expert_width, itemsize).rows
        return groups * tile / 2 / even
    if backend != "megablox":
        return 0.0
    step = tpu_tiles.Tiles(tpu_tiles.ROWS, 1, 1).clip(rows, 1, 1).step
    return (groups - 0.5) * step / even
