"""Quickstart: a small sparse-expert language model learns the Python standard library as bytes.

    python3 train.py --config=configs/quickstart.py --workdir=runs/quickstart

Top-2 routing (as in Qwen3, arXiv:2505.09388) over fine-grained experts, with a global balance loss.
Arguments after a colon choose a twin: `:dense` is the dense model of equal active FLOPs; `:router=NAME` takes
another router with that router's defaults. Both change nothing else.
"""

from moe.config import ConfigDict, default_config
from moe.errors import ConfigError


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    for part in filter(None, arg.split(",")):
        _apply(config, part)
    return config


def _apply(config: ConfigDict, part: str) -> None:
    name, _, value = part.partition("=")
    if name == "dense":
        config.model.pattern = ("dense",)
    elif name == "router":
        config.router.name = value
    else:
        raise ConfigError(
            f"argument {part!r} of configs/quickstart.py is neither 'dense' nor 'router=NAME': write for "
            "example --config=configs/quickstart.py:dense."
        )
