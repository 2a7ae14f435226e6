"""Vision: which digit does a picture show? A vision transformer.

    python3 scripts/prepare_data.py mnist_digits
    python3 train.py --config=configs/mnist_digits.py --workdir=runs/mnist_digits
    python3 eval.py --workdir=runs/mnist_digits --split=test

10,000 pictures, split by their pixels.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit a372cf2, 3 minutes on one of two busy cores, one seed): accuracy 0.977 (0.967 to
0.986), dense 0.974 (0.963 to 0.983), best simple method 0.918 logistic regression.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 1200
    config.task.name = "classify"
    config.model.update({"num_layers": 2, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 128, "dropout": 0.1})
    config.router.k = 2
    config.data.update(
        {"name": "mnist_digits", "batch_size": 64, "sequence_length": 36, "patch": 8}
    )
    with config.ignore_type():
        config.data.stride = 4
        config.evaluation.generalisation = {
            "noise": {"corrupt": "noise:0.2"},
            "occluded": {"corrupt": "occlude:0.3"},
        }
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100})
    config.evaluation.every = 200
    config.checkpoint.every = 200
    return twins.apply(config, arg, "mnist_digits.py")
