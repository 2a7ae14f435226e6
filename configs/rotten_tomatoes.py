"""Classification: is a sentence of a film review for or against?

    python3 scripts/prepare_data.py rotten_tomatoes imdb
    python3 train.py --config=configs/rotten_tomatoes.py --workdir=runs/rotten_tomatoes
    python3 eval.py --workdir=runs/rotten_tomatoes --split=test

8,530 sentences, split by text.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit 4cb36fe, 2 minutes on one of two busy cores, one seed): accuracy 0.756 (0.727 to
0.789), dense 0.760 (0.732 to 0.790), best simple method 0.771 TF-IDF, 0.768 naive Bayes.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 800
    config.task.name = "classify"
    config.model.update({"num_layers": 2, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 96, "dropout": 0.5})
    config.router.k = 2
    config.data.update({"name": "rotten_tomatoes", "batch_size": 64, "sequence_length": 64})
    with config.ignore_type():
        config.data.update({"tokenizer": "bpe", "vocab_size": 8192})
        config.evaluation.generalisation = {
            "other_domain": {"name": "imdb", "sequence_length": 256},
            "typos": {"corrupt": "typos:0.05"},
        }
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 50, "weight_decay": 3.0})
    config.evaluation.every = 200
    config.checkpoint.every = 200
    return twins.apply(config, arg, "rotten_tomatoes.py")
