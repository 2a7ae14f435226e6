"""Answering: which name was taken out of a sentence of a novel?

    python3 scripts/prepare_data.py name_cloze
    python3 train.py --config=configs/name_cloze.py --workdir=runs/name_cloze
    python3 eval.py --workdir=runs/name_cloze --split=test

Questions made from the novels of Jane Austen, held out by novel.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 800
    config.task.name = "seq2seq"
    config.model.update({"num_layers": 3, "width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32})
    config.model.update({"num_experts": 8, "expert_width": 128})
    config.router.k = 2
    config.data.update({"name": "name_cloze", "batch_size": 8, "sequence_length": 768})
    with config.ignore_type():
        config.data.update({"tokenizer": "bpe", "vocab_size": 2048})
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 80})
    config.evaluation.update({"every": 200, "decode": "greedy", "decode_length": 8})
    config.checkpoint.every = 200
    return twins.apply(config, arg, "name_cloze.py")
