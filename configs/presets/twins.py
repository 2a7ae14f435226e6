"""What stands after the colon of a task's config: its dense twin, or another router."""

from pathlib import Path

from moe.config import ConfigDict, import_beside
from moe.errors import ConfigError

routers = import_beside(str(Path(__file__).parent), "routers.py")


def apply(config: ConfigDict, arg: str, name: str) -> ConfigDict:
    """Makes the twin of a config that its argument names; changes nothing else.

    Args:
        config: changed in place.
        arg: parts with commas between: `dense`, the dense model of equal active FLOPs; `router=NAME`,
            a preset of configs/routers.py at equal active FLOPs.
        name: of the config file, for messages.

    Raises:
        ConfigError: another part.
    """
    m = config.model
    m.mlp_width = config.router.k * m.expert_width + m.shared_experts * m.expert_width
    for part in filter(None, arg.split(",")):
        key, _, value = part.partition("=")
        if key == "dense":
            m.update({"pattern": ("dense",), "shared_experts": 0})
        elif key == "router":
            routers.apply(config, value)
        else:
            raise ConfigError(
                f"argument {part!r} of configs/{name} is neither 'dense' nor 'router=NAME': write for "
                f"example --config=configs/{name}:dense."
            )
    return config
