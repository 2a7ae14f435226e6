"""Image and text: which name belongs to which emoji? Patches and words go through one model.

    python3 scripts/prepare_data.py emoji
    python3 train.py --config=configs/emoji.py --workdir=runs/emoji
    python3 eval.py --workdir=runs/emoji --split=test

1,920 pictures with names in four languages, held out by picture.
After a colon, with commas between: `caption`, which writes the name behind the picture (seq2seq) instead of
finding it; `dense`, the dense model of equal active FLOPs, or `router=NAME`. Experts are one pool for both;
`:router=modality_pools` gives each its own.

Reached on test (commit eba728b, 3 minutes on one of two busy cores, one seed): recall@5 0.359 (0.326 to
0.391), dense 0.318 (0.285 to 0.348), best simple method 0.333 nearest colours.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 800
    config.task.name = "match"
    config.model.update({"num_layers": 2, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 128, "dropout": 0.1, "qk_norm": "head"})
    config.router.k = 2
    config.data.update({"name": "emoji", "batch_size": 96, "sequence_length": 48, "patch": 8})
    with config.ignore_type():
        config.data.update({"tokenizer": "bpe", "vocab_size": 2048})
        config.evaluation.generalisation = {"noise": {"corrupt": "noise:0.1"}}
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 80})
    config.evaluation.every = 200
    config.checkpoint.every = 200
    parts = arg.split(",")
    if "caption" in parts:
        config.task.name = "seq2seq"
        config.evaluation.update({"decode": "greedy", "decode_length": 24})
    return twins.apply(config, ",".join(p for p in parts if p != "caption"), "emoji.py")
