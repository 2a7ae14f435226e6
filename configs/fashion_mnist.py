"""Vision: which of ten kinds of clothes does a picture show? A vision transformer.

    python3 scripts/prepare_data.py fashion_mnist
    python3 train.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
    python3 eval.py --workdir=runs/fashion_mnist --split=test

60,000 + 10,000 pictures, official split; the last 5,000 of train are valid.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit a929b81, 8 minutes on one of two busy cores, one seed): accuracy 0.894 (0.888 to
0.899), dense 0.894 (0.889 to 0.900), best simple method 0.845 logistic regression.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 3000
    config.task.name = "classify"
    config.model.update({"num_layers": 3, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 128, "dropout": 0.05})
    config.router.k = 2
    config.data.update(
        {"name": "fashion_mnist", "batch_size": 64, "sequence_length": 36, "patch": 8}
    )
    with config.ignore_type():
        config.data.stride = 4
        config.evaluation.generalisation = {
            "noise": {"corrupt": "noise:0.1"},
            "occluded": {"corrupt": "occlude:0.3"},
        }
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 200})
    config.evaluation.every = 500
    config.checkpoint.every = 500
    return twins.apply(config, arg, "fashion_mnist.py")
