"""Long text: is a film review, read byte by byte, for or against? Weights over segments pool it.

    python3 scripts/prepare_data.py imdb
    python3 train.py --config=configs/long_reviews.py --workdir=runs/long_reviews
    python3 eval.py --workdir=runs/long_reviews --split=test

The text task of the Long Range Arena (Tay et al. 2021, arXiv:2011.04006) on the split of configs/imdb.py:
1,024 bytes of each review, cut into a quarter to a half of the row as the model learns (`task.size`), a vector
and a weight for each part. After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`;
`router=segment` sends whole segments to experts.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 600
    config.task.update({"name": "classify", "pool": "segment", "size": "learned"})
    config.model.update({"num_layers": 2, "width": 64, "heads": 4, "kv_heads": 4, "head_dim": 16})
    config.model.update({"num_experts": 8, "expert_width": 64, "dropout": 0.1})
    config.router.k = 2
    config.data.update({"name": "imdb", "batch_size": 8, "sequence_length": 1024})
    with config.ignore_type():
        config.evaluation.generalisation = {"longer": {"sequence_length": 2048}}
    config.attention.name = "segment"
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 60})
    config.evaluation.every = 300
    config.checkpoint.every = 300
    return twins.apply(config, arg, "long_reviews.py")
