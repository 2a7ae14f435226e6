"""Quickstart: a small sparse-expert language model learns the Python standard library as bytes.

    python3 train.py --config=configs/quickstart.py --workdir=runs/quickstart

Top-4 of 16 fine-grained experts with renormalised softmax gates (as in Qwen3, arXiv:2505.09388), dropless,
with a global balance loss (arXiv:2501.11873). After a colon comes a twin: `:dense` is the dense model
of equal active FLOPs, `:router=NAME` a preset of configs/routers.py: another router with the settings of its
paper, at equal active FLOPs. Both change nothing else.
"""

from moe.config import ConfigDict, default_config, import_beside
from moe.errors import ConfigError

routers = import_beside(__file__, "routers.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.update({"steps": 200})
    config.model.update({"num_experts": 16, "expert_width": 96})
    config.router.k = 4
    config.model.mlp_width = config.router.k * config.model.expert_width  # of the dense twin
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 40})
    config.evaluation.every = 100
    config.checkpoint.every = 50
    for part in filter(None, arg.split(",")):
        _apply(config, part)
    return config


def _apply(config: ConfigDict, part: str) -> None:
    name, _, value = part.partition("=")
    if name == "dense":
        config.model.pattern = ("dense",)
    elif name == "router":
        routers.apply(config, value)
    else:
        raise ConfigError(
            f"argument {part!r} of configs/quickstart.py is neither 'dense' nor 'router=NAME': write for "
            "example --config=configs/quickstart.py:dense."
        )
