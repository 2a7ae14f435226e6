"""Answering: which word does a definition belong to? Both as vectors, compared.

    python3 scripts/prepare_data.py definitions
    python3 train.py --config=configs/definitions.py --workdir=runs/definitions
    python3 eval.py --workdir=runs/definitions --split=test

Definitions of WordNet, held out by definition; a word may occur on both sides with another sense.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit a4b9375, 5 minutes on one of two busy cores, one seed): choice among four 0.723 (0.712
to 0.734), dense 0.706 (0.695 to 0.719), best simple method 0.345 word overlap.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 900
    config.task.name = "match"
    config.model.update({"num_layers": 2, "width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32})
    config.model.update({"num_experts": 8, "expert_width": 128, "qk_norm": "head"})
    config.router.k = 2
    config.data.update({"name": "definitions", "batch_size": 128, "sequence_length": 40})
    with config.ignore_type():
        config.data.update({"tokenizer": "bpe", "vocab_size": 8192})
        config.evaluation.generalisation = {
            "new_words": {"split": "test_new_words"},
            "typos": {"corrupt": "typos:0.05"},
        }
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 100})
    config.evaluation.every = 300
    config.checkpoint.every = 300
    return twins.apply(config, arg, "definitions.py")
