"""The model on which routers are compared: as small as still tells them apart, seconds a run on one core.

    python3 train.py --config=configs/comparison.py:router=deepseek_v3 --workdir=runs/one

Two sparse layers of top-4 of 16 experts over bytes of the Python standard library. Training reads the
domain `code` alone; evaluation reads `prose` too, so that the loss by domain tells in-domain from
out-of-domain text. Arguments after a colon, separated by commas: `router=NAME`, a preset of
configs/routers.py at equal active FLOPs; `dense`, the dense twin of equal active FLOPs; `dense_total`, the
dense twin of equal total parameters; `classify`, the task of naming the domain of every row, for which
all domains are trained on; put it last.
"""

from moe.config import ConfigDict, default_config, import_beside
from moe.errors import ConfigError

routers = import_beside(__file__, "routers.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins or tasks."""
    config = default_config()
    config.steps = 150
    config.model.update({"num_layers": 2, "width": 64, "heads": 4, "kv_heads": 4, "head_dim": 16})
    config.model.update({"num_experts": 16, "expert_width": 32})
    config.router.k = 4
    config.data.update({"batch_size": 16, "sequence_length": 128})
    with config.ignore_type():
        config.data.weights = {"code": 1.0}
    config.optimizer.update({"learning_rate": 5e-3, "warmup_steps": 15})
    config.dispatch.name = "grouped"
    config.log_every = 10
    config.evaluation.update({"every": config.steps})
    with config.ignore_type():
        config.evaluation.batches = 48
    config.checkpoint.update({"every": 50, "keep_latest": 3, "keep_best": 0})
    for part in filter(None, arg.split(",")):
        _apply(config, part)
    return config


def _apply(config: ConfigDict, part: str) -> None:
    name, _, value = part.partition("=")
    m = config.model
    if name == "router":
        routers.apply(config, value)
    elif name == "dense":
        m.update({"pattern": ("dense",), "mlp_width": config.router.k * m.expert_width})
    elif name == "dense_total":
        m.update({"pattern": ("dense",), "mlp_width": m.num_experts * m.expert_width})
    elif name == "classify":
        config.task.name = "classify"
        config.data.weights = None
    else:
        raise ConfigError(
            f"argument {part!r} of configs/comparison.py is none of router=NAME, dense, dense_total and "
            "classify: write for example --config=configs/comparison.py:router=topk,classify."
        )
