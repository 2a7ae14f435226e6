"""From the config's section `dispatch` to a function that moves tokens to experts."""

import math

from jax.sharding import Mesh

from moe.axes import SEQUENCE
from moe.config import ConfigDict, require
from moe.dispatch.capacity import group_size
from moe.dispatch.table import EXCHANGES, make_dispatch
from moe.dispatch.types import Dispatch
from moe.model.experts import expert_specs
from moe.parallel.mesh import batch_shards
from moe.parallel.rules import find_rules

BOUNDED = ("capacity", "einsum")  # the paths with slots


def build_dispatch(config: ConfigDict, mesh: Mesh | None, *, training: bool) -> Dispatch:
    """How tokens reach experts, in training or in evaluation.

    Evaluation drops nothing unless it is told to: paths with slots have `eval_capacity_factor`, and
    give way to `grouped` where that is None. A bounded buffer gives way to one with room for everything,
    and more chunks make it no larger than the bounded one.

    Args:
        config: complete config.
        mesh: with the axes of `moe.axes`; None is one device.
        training: whether for training.

    Raises:
        ConfigError: an unknown name, or options that do not go together.
    """
    options = config.dispatch.to_dict()
    name, eval_factor = options.pop("name"), options.pop("eval_capacity_factor")
    rules = find_rules(config.mesh.rules)
    if not training:
        name = "grouped" if name in BOUNDED and eval_factor is None else name
        options["capacity_factor"] = eval_factor
        bound = options.pop("buffer_factor")
        if bound is not None and mesh is not None:
            shards = rules.expert_shards(mesh)
            # A power of two has large common divisors with the numbers of tokens that occur.
            more = math.ceil(max(shards / bound, 1))
            options["chunks"] *= 1 << (more - 1).bit_length()
        if name not in EXCHANGES[options["exchange"]]:  # chosen for another path
            options["exchange"] = "auto"
    size = 1
    if name in BOUNDED:
        length, shards = config.data.sequence_length, 1 if mesh is None else mesh.shape[SEQUENCE]
        size = group_size(options["group"], length, shards)
    if training:
        _check_chunks(config, mesh, size)
    specs = expert_specs(rules)
    return make_dispatch(name, mesh, param_specs=specs, expert_axes=rules.expert_axes, **options)


def _check_chunks(config: ConfigDict, mesh: Mesh | None, size: int) -> None:
    """Refuses chunks that the token groups, of `size` positions, of a device cannot be cut into."""
    cut, shards = (1, 1) if mesh is None else (batch_shards(mesh), mesh.shape[SEQUENCE])
    rows = config.data.batch_size // (cut * config.optimizer.accumulation)
    length = config.data.sequence_length // shards
    units = rows * length // size
    chunks = config.dispatch.chunks
    require(
        units % chunks == 0,
        f"dispatch.chunks={chunks} does not divide the {units} "
        f"{'tokens' if size == 1 else f'token groups of {size} positions'} that a device has at once "
        f"({rows} rows of {length} positions): chunks have the same size. Use a divisor of "
        f"{units}.",
    )
