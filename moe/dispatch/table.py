"""The dispatch paths by name, on one device or across a mesh."""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from moe.axes import EXPERT, TENSOR
from moe.dispatch.capacity import capacity
from moe.dispatch.exchange import capacity_exchange, grouped_exchange
from moe.dispatch.grouped import grouped
from moe.dispatch.plans import by_plan
from moe.dispatch.reference import reference
from moe.dispatch.types import Dispatch, Dispatched, ExpertFn
from moe.errors import ConfigError
from moe.parallel.rules import token_spec
from moe.routing.types import Choices

DISPATCH = ("grouped", "capacity", "reference")


def make_dispatch(
    name: str,
    mesh: Mesh | None,
    *,
    param_specs: Any = None,
    capacity_factor: float | None = None,
    priority: str = "token_major",
    backend: str | None = None,
) -> Dispatch:
    """One function `(x, plan, params, expert_fn) -> Dispatched` for every kind of plan.

    `Choices` go by the path `name`. With one device it runs where it is; with more it runs in one
    `shard_map`: tokens by `token_spec`, experts by `param_specs`, and an exchange over the expert
    axis. The other plans have one path each (`moe.dispatch.plans`), which drops nothing.

    Args:
      name: `grouped` (dropless), `capacity`, or `reference` (the oracle; left to the partitioner).
      mesh: with the axes of `moe.axes`; None is one device.
      param_specs: partition specs like the experts' parameters; `EXPERT` first, and axes sharded over
        `TENSOR` such that each shard's output is a partial sum. None: only `E` is sharded.
      capacity_factor: of `capacity`; None drops nothing.
      priority: of `capacity`.
      backend: of `grouped`, see `grouped_matmul`.

    Raises:
      ConfigError: no path has that name.
    """
    if name not in DISPATCH:
        raise ConfigError(
            f"dispatch.name={name!r} is no way to dispatch; use one of {', '.join(DISPATCH)}."
        )
    if name == "reference":
        return by_plan(reference, mesh)
    alone = mesh is None or mesh.size == 1
    if name == "grouped":
        path = functools.partial(grouped if alone else grouped_exchange, backend=backend)
    else:
        path = functools.partial(
            capacity if alone else capacity_exchange,
            capacity_factor=capacity_factor,
            priority=priority,
        )
    return by_plan(path if mesh is None or alone else across(path, mesh, param_specs), mesh)


def across(path: Dispatch, mesh: Mesh, param_specs: Any) -> Dispatch:
    """Runs `path` on every shard of the mesh. Sums over `TENSOR` last, where rows are fewest."""

    def dispatch(
        x: Float[Array, "B S D"], choices: Choices, params: Any, expert_fn: ExpertFn
    ) -> Dispatched:
        specs, tokens = param_specs, token_spec(mesh, x.shape[1])
        if specs is None:
            specs = jax.tree.map(lambda _: PartitionSpec(EXPERT), params)

        def shard(x: Array, choices: Choices, params: Any) -> Dispatched:
            output, kept = path(x, choices, params, expert_fn)
            if TENSOR in jax.typeof(output).mat.varying:
                output = jax.lax.psum(output, TENSOR)
            return Dispatched(output, kept)

        return jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(tokens, tokens, specs),
            out_specs=tokens,
        )(x, choices, params)

    return dispatch


def check(num_experts: int, mesh: Mesh, expert_axes: Sequence[str] = (EXPERT,)) -> None:
    """Refuses experts that cannot be spread evenly.

    Raises:
      ConfigError: `num_experts` is not divisible by the product of the sizes of `expert_axes`.
    """
    shards = math.prod(mesh.shape[name] for name in expert_axes)
    if num_experts % shards:
        below = num_experts - num_experts % shards
        above = below + shards
        fix = f"{below} or {above}" if below else f"{above}"
        sizes = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in expert_axes)
        sizes += f" = {shards}" if len(expert_axes) > 1 else ""
        raise ConfigError(
            f"model.num_experts={num_experts} is not divisible by {sizes}: every shard of the experts "
            f"holds the same number of them. Use {fix} experts, or sizes that divide {num_experts}."
        )
