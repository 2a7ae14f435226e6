"""From the config's section `dispatch` to a function that moves tokens to experts."""

from jax.sharding import Mesh

from moe.axes import SEQUENCE
from moe.config import ConfigDict
from moe.dispatch.capacity import group_size
from moe.dispatch.table import make_dispatch
from moe.dispatch.types import Dispatch
from moe.model.experts import expert_specs
from moe.parallel.rules import find_rules

BOUNDED = ("capacity", "einsum")  # the paths with slots


def build_dispatch(config: ConfigDict, mesh: Mesh | None, *, training: bool) -> Dispatch:
    """How tokens reach experts, in training or in evaluation.

    Evaluation drops nothing unless it is told to: paths with slots have `eval_capacity_factor`, and
    give way to `grouped` where that is None; no buffer is bounded.

    Args:
        config: complete config.
        mesh: with the axes of `moe.axes`; None is one device.
        training: whether for training.

    Raises:
        ConfigError: an unknown name, or options that do not go together.
    """
    options = config.dispatch.to_dict()
    name, eval_factor = options.pop("name"), options.pop("eval_capacity_factor")
    if not training:
        options |= {"capacity_factor": eval_factor, "buffer_factor": None}
        name = "grouped" if name in BOUNDED and eval_factor is None else name
    if name in BOUNDED:
        shards = 1 if mesh is None else mesh.shape[SEQUENCE]
        group_size(options["group"], config.data.sequence_length, shards)
    rules = find_rules(config.mesh.rules)
    specs = expert_specs(rules)
    return make_dispatch(name, mesh, param_specs=specs, expert_axes=rules.expert_axes, **options)
