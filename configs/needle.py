"""Long text: one number is hidden in a novel; what is it?

    python3 scripts/prepare_data.py needle
    python3 train.py --config=configs/needle.py --workdir=runs/needle
    python3 eval.py --workdir=runs/needle --split=test

Filler from the novels of Jane Austen, held out by novel; the needle stands anywhere.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 2000
    config.task.name = "seq2seq"
    config.model.update({"num_layers": 2, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 96})
    config.router.k = 2
    config.data.update({"name": "needle", "batch_size": 64, "sequence_length": 144})
    with config.ignore_type():
        config.data.update({"tokenizer": "bpe", "vocab_size": 512})
        config.evaluation.generalisation = {
            "longer_2x": {"split": "test_2x", "sequence_length": 272, "batch_size": 32},
            "longer_4x": {"split": "test_4x", "sequence_length": 528, "batch_size": 16},
        }
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 100})
    config.evaluation.update({"every": 500, "decode": "greedy", "decode_length": 8})
    config.checkpoint.every = 500
    return twins.apply(config, arg, "needle.py")
