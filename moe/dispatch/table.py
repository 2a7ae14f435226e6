"""The dispatch paths by name, on one device or across a mesh."""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from moe.axes import BATCH_AXES, EXPERT, SEQUENCE, TENSOR
from moe.dispatch.capacity import Seating, capacity, group_size
from moe.dispatch.chunks import in_chunks
from moe.dispatch.edges import vary_together
from moe.dispatch.einsum import einsum
from moe.dispatch.exchange import capacity_exchange, grouped_exchange
from moe.dispatch.exchange_gather import capacity_gather, grouped_gather
from moe.dispatch.exchange_ragged import ragged_exchange
from moe.dispatch.grouped import grouped
from moe.dispatch.grouped_matmul import check_backend, default_backend
from moe.dispatch.plans import by_plan
from moe.dispatch.reference import reference
from moe.dispatch.transfer import NATIVE_PLATFORMS
from moe.dispatch.types import Dispatch, Dispatched, ExpertFn
from moe.errors import ConfigError
from moe.parallel.rules import token_spec
from moe.routing.types import Choices

DISPATCH = ("grouped", "capacity", "einsum", "reference")
# Exchange -> the paths that have it.
EXCHANGES = {
    "auto": DISPATCH,
    "all_to_all": ("grouped", "capacity"),
    "ragged": ("grouped",),
    "all_gather": ("grouped", "capacity"),
}


def make_dispatch(
    name: str,
    mesh: Mesh | None,
    *,
    param_specs: Any = None,
    expert_axes: tuple[str, ...] = (EXPERT,),
    capacity_factor: float | None = None,
    priority: str = "token_major",
    group: int | None = None,
    capacity_multiple: int = 1,
    renormalize: bool = False,
    exchange: str = "auto",
    buffer_factor: float | None = None,
    chunks: int = 1,
    backend: str = "auto",
) -> Dispatch:
    """One function `(x, plan, params, expert_fn) -> Dispatched` for every kind of plan.

    `Choices` go by the path `name`. With one device it runs where it is; with more it runs in one
    `shard_map`: tokens over `BATCH_AXES` and `SEQUENCE`, experts by `param_specs`, and an exchange over
    `expert_axes`. The other plans have one path each (`moe.dispatch.plans`), which drops nothing.

    Args:
      name: `grouped` (dropless), `capacity`, `einsum` (its twin by one-hot products) or `reference` (the
        oracle); the last two are left to the partitioner.
      mesh: with the axes of `moe.axes`; None is one device.
      param_specs: partition specs like the experts' parameters; `expert_axes` first, and axes sharded
        over `TENSOR` such that each shard's output is a partial sum. None: only `E` is sharded.
      expert_axes: mesh axes that `E` lies on, among those that the batch lies on.
      capacity_factor: of `capacity` and `einsum`, as the four that follow; None drops nothing.
      priority: who gets a slot, see `capacity`.
      group: positions of a token group; None is the whole row.
      capacity_multiple: slots are rounded up to a multiple of this.
      renormalize: gates of kept choices take over the mass of dropped ones.
      exchange: `all_to_all` in even parts; `ragged`, of `grouped`, which sends only rows that exist;
        `all_gather` of tokens with a reduce-scatter of outputs, which sends each token once to every
        shard. `auto`: `all_gather` where a token has at least as many choices as there are shards, for
        then it sends no more rows, unless `buffer_factor` is given; else `ragged` for `grouped` where
        the devices have it; else `all_to_all`.
      buffer_factor: of `grouped`: rows that a shard can receive relative to balance, in all (`ragged`)
        or from each other shard (`all_to_all`); what goes beyond is dropped, and reported so. None:
        room for everything, however uneven the load.
      chunks: parts of the tokens that are dispatched one after another, to bound memory (`in_chunks`).
      backend: of `grouped`, see `grouped_matmul`; `auto` is the best for the platform of the mesh.

    Raises:
      ConfigError: an unknown name, or options that do not go together.
    """
    how = Exchange(exchange, buffer_factor, _platform(mesh), _has_ragged(mesh), expert_axes)
    if mesh is not None and mesh.size == 1:
        mesh = None
    _check_options(name, how, chunks)
    seating = Seating(capacity_factor, priority, group, capacity_multiple, renormalize)
    if name == "reference":
        return by_plan(reference, mesh, expert_axes)
    if name == "einsum":
        where = {"mesh": mesh, "expert_axes": expert_axes}
        return by_plan(functools.partial(einsum, **where, **seating._asdict()), mesh, expert_axes)
    if name == "grouped":
        backend = default_backend(how.platform) if backend == "auto" else backend
        check_backend(backend, how.platform)
        options, unit = {"backend": backend}, 1
    else:
        options, unit = seating._asdict(), group
    if mesh is None:
        path = in_chunks(functools.partial(LOCAL[name], **options), chunks, unit)
    else:
        path = in_chunks(functools.partial(_exchanged, name, how, options), chunks, unit)
        path = across(path, mesh, param_specs, expert_axes, seating if name == "capacity" else None)
    return by_plan(path, mesh, expert_axes)


class Exchange(NamedTuple):
    """How rows travel between the shards that experts lie on."""

    name: str
    buffer_factor: float | None
    platform: str
    is_native: bool  # whether the devices have a ragged all-to-all
    axes: tuple[str, ...]

    def resolved(self, path: str, n: int, K: int) -> str:
        """The exchange of `path` for `n` shards and `K` choices a token; `none` for one shard."""
        if n == 1:
            return "none"
        if self.name != "auto":
            return self.name
        if n <= K and self.buffer_factor is None:
            return "all_gather"
        return "ragged" if path == "grouped" and self.is_native else "all_to_all"


LOCAL: dict[str, Callable] = {"grouped": grouped, "capacity": capacity}
ACROSS: dict[tuple[str, str], Callable] = {
    ("grouped", "all_to_all"): grouped_exchange,
    ("grouped", "ragged"): ragged_exchange,
    ("grouped", "all_gather"): grouped_gather,
    ("capacity", "all_to_all"): capacity_exchange,
    ("capacity", "all_gather"): capacity_gather,
}


def _exchanged(
    name: str,
    how: Exchange,
    options: dict[str, Any],
    x: Array,
    choices: Choices,
    params: Any,
    expert_fn: ExpertFn,
) -> Dispatched:
    """One shard's part, inside `shard_map`."""
    exchange = how.resolved(name, jax.lax.axis_size(how.axes), choices.expert.shape[-1])
    if exchange == "none":
        return LOCAL[name](x, choices, params, expert_fn, **options)
    if name == "grouped" and exchange != "all_gather":
        options = options | {"buffer_factor": how.buffer_factor}
    if exchange == "ragged":
        options = options | {"is_native": how.is_native}
    return ACROSS[name, exchange](x, choices, params, expert_fn, axes=how.axes, **options)


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _has_ragged(mesh: Mesh | None) -> bool:
    if mesh is None:  # nothing is exchanged
        return True
    first = mesh.devices.flat[0]
    return has_ragged_all_to_all(first.platform, first.device_kind, mesh.size)


def has_ragged_all_to_all(platform: str, device_kind: str, count: int) -> bool:
    """Whether XLA compiles a ragged all-to-all for `count` of these devices.

    It does not for slices of v5e of more than 16 chips, whose network routes between neighbours only.
    """
    limited = device_kind == "TPU v5 lite" and count > 16
    return platform in NATIVE_PLATFORMS and not limited


def _check_options(name: str, how: Exchange, chunks: int) -> None:
    if name not in DISPATCH:
        raise ConfigError(
            f"dispatch.name={name!r} is no way to dispatch; use one of {', '.join(DISPATCH)}."
        )
    if how.name not in EXCHANGES or name not in EXCHANGES[how.name]:
        able = [one for one, paths in EXCHANGES.items() if name in paths]
        raise ConfigError(
            f"dispatch.exchange={how.name!r} is no exchange of dispatch.name={name!r}; use one of "
            f"{', '.join(able)}."
        )
    if how.name == "ragged" and how.platform in NATIVE_PLATFORMS and not how.is_native:
        raise ConfigError(
            "dispatch.exchange='ragged': XLA compiles no ragged all-to-all for more than 16 chips of v5e, "
            "whose network routes between neighbours only. Use dispatch.exchange=all_to_all with "
            "dispatch.buffer_factor=1.1, or auto."
        )
    if how.buffer_factor is not None and (name != "grouped" or how.name == "all_gather"):
        raise ConfigError(
            f"dispatch.buffer_factor={how.buffer_factor} bounds what a shard receives of rows that exist, and "
            f"dispatch.name={name!r} with dispatch.exchange={how.name!r} does not send these. Use "
            "dispatch.name=grouped with dispatch.exchange=ragged or all_to_all, or buffer_factor=none."
        )
    if chunks > 1 and name not in LOCAL:
        raise ConfigError(
            f"dispatch.chunks={chunks}: dispatch.name={name!r} has no chunks. Use one of "
            f"{', '.join(LOCAL)}, or chunks=1."
        )
    strangers = [axis for axis in how.axes if axis not in BATCH_AXES]
    if strangers:
        raise ConfigError(
            f"experts over the mesh axes {', '.join(how.axes)}: {', '.join(strangers)} does not shard the "
            f"batch, and rows are exchanged between shards of the batch. Use axes among "
            f"{', '.join(BATCH_AXES)}."
        )


def across(
    path: Dispatch,
    mesh: Mesh,
    param_specs: Any,
    expert_axes: tuple[str, ...],
    seating: Seating | None = None,
) -> Dispatch:
    """Runs `path` on every shard of the mesh. Sums over `TENSOR` last, where rows are fewest.

    Args:
      path: one shard's part.
      mesh: with the axes of `moe.axes`.
      param_specs: as for `make_dispatch`.
      expert_axes: mesh axes that `E` lies on.
      seating: of the slots, where the path has some.
    """

    def dispatch(
        x: Float[Array, "B S D"], choices: Choices, params: Any, expert_fn: ExpertFn
    ) -> Dispatched:
        S = x.shape[1]
        specs, tokens = param_specs, token_spec(mesh, S)
        if seating is not None and SEQUENCE in tokens:
            group_size(seating.group, S, mesh.shape[SEQUENCE])
        if specs is None:
            specs = jax.tree.map(lambda _: PartitionSpec(expert_axes), params)

        def shard(x: Array, choices: Choices, params: Any) -> Dispatched:
            # So that gradients of rows, too, stay parts of sums until they are gradients of tokens.
            x, *_ = vary_together(x, *jax.tree.leaves(params))
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
