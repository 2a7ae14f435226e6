"""Classification: which of five desks of the BBC wrote a news article?

    python3 scripts/prepare_data.py bbc
    python3 train.py --config=configs/bbc.py --workdir=runs/bbc
    python3 eval.py --workdir=runs/bbc --split=test

2,127 articles, repeated ones on one side.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit 67d103e, 4 minutes on one of two busy cores, one seed): accuracy 0.910 (0.869 to
0.950), dense 0.910 (0.864 to 0.950), best simple method 0.980 TF-IDF, 0.955 naive Bayes.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 400
    config.task.name = "classify"
    config.model.update({"num_layers": 2, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 96, "dropout": 0.2})
    config.router.k = 2
    config.data.update({"name": "bbc", "batch_size": 32, "sequence_length": 256})
    with config.ignore_type():
        config.data.update({"tokenizer": "bpe", "vocab_size": 8192})
        config.evaluation.generalisation = {
            "longer": {"sequence_length": 512},
            "typos": {"corrupt": "typos:0.05"},
            "shuffled_words": {"corrupt": "shuffle_words:1.0"},
        }
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 50})
    config.evaluation.every = 100
    config.checkpoint.every = 100
    return twins.apply(config, arg, "bbc.py")
