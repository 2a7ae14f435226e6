"""Long text: one number is hidden in a novel; what is it?

    python3 scripts/prepare_data.py needle
    python3 train.py --config=configs/needle.py --workdir=runs/needle
    python3 eval.py --workdir=runs/needle --split=test

Filler from the novels of Jane Austen, held out by novel; the needle stands anywhere.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit eba728b, 6 minutes on one of two busy cores, one seed): exact match 0.998 (0.995 to
1.000), dense 1.000 (1.000 to 1.000), best simple method 1.000 by copying any number.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 700
    config.task.name = "seq2seq"
    config.model.update({"num_layers": 3, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 96, "qk_norm": "head"})
    config.router.k = 2
    config.data.update({"name": "needle", "batch_size": 64, "sequence_length": 104})
    with config.ignore_type():
        config.data.update({"tokenizer": "bpe", "vocab_size": 2048})
        config.evaluation.generalisation = {
            "longer_2x": {"split": "test_2x", "sequence_length": 200, "batch_size": 32},
            "longer_4x": {"split": "test_4x", "sequence_length": 392, "batch_size": 16},
        }
    config.optimizer.update({"learning_rate": 4e-3, "warmup_steps": 100})
    config.evaluation.update({"every": 350, "decode": "greedy", "decode_length": 8})
    config.checkpoint.every = 350
    return twins.apply(config, arg, "needle.py")
