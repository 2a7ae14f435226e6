"""Long text: the value of nested lists of operations (Long Range Arena).

    python3 scripts/prepare_data.py listops
    python3 train.py --config=configs/listops.py --workdir=runs/listops
    python3 eval.py --workdir=runs/listops --split=test

Generated, ten classes, an exact solver.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 1000
    config.task.name = "classify"
    config.model.update({"num_layers": 3, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 96})
    config.router.k = 2
    config.data.update({"name": "listops", "batch_size": 32, "sequence_length": 256})
    with config.ignore_type():
        config.evaluation.generalisation = {
            "longer": {"split": "test_long", "sequence_length": 512}
        }
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100})
    config.evaluation.every = 250
    config.checkpoint.every = 250
    return twins.apply(config, arg, "listops.py")
