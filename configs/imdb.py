"""Classification: is a film review for or against? An encoder over byte pairs, pooled.

    python3 scripts/prepare_data.py imdb rotten_tomatoes
    python3 train.py --config=configs/imdb.py --workdir=runs/imdb
    python3 eval.py --workdir=runs/imdb --split=test

25,000 reviews of IMDB, split by text.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit f1a14fa, 9 minutes on one of two busy cores, one seed): accuracy 0.827 (0.811 to
0.841), dense 0.815 (0.800 to 0.830), best simple method 0.910 TF-IDF, 0.847 naive Bayes.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 1000
    config.task.name = "classify"
    config.model.update({"num_layers": 2, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 96, "dropout": 0.2})
    config.router.k = 2
    config.data.update({"name": "imdb", "batch_size": 32, "sequence_length": 256})
    with config.ignore_type():
        config.data.update({"tokenizer": "bpe", "vocab_size": 8192})
        config.evaluation.generalisation = {
            "other_domain": {"name": "rotten_tomatoes"},
            "longer": {"sequence_length": 512, "batch_size": 16},
            "typos": {"corrupt": "typos:0.05"},
        }
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100})
    config.evaluation.every = 250
    config.checkpoint.every = 250
    return twins.apply(config, arg, "imdb.py")
