"""Long text: chapters of novels, a thousand bytes at a time, in segments.

    python3 scripts/prepare_data.py novels
    python3 train.py --config=configs/chapters.py --workdir=runs/chapters
    python3 eval.py --workdir=runs/chapters --split=test

Six novels of Jane Austen, two of them held out whole. Attention is within a segment and to summaries of
earlier ones (`attention.name=segment`). After a colon: `full`, attention to every earlier byte; `dense`, the
dense model of equal active FLOPs, or `router=NAME`; `router=segment` sends whole segments to experts.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 400
    config.model.update({"num_layers": 3, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 96})
    config.router.k = 2
    config.data.update({"name": "novels", "batch_size": 4, "sequence_length": 1024})
    with config.ignore_type():
        config.evaluation.generalisation = {"longer": {"sequence_length": 2048}}
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 40})
    config.evaluation.every = 200
    config.checkpoint.every = 200
    parts = arg.split(",")
    config.attention.name = "full" if "full" in parts else "segment"
    return twins.apply(config, ",".join(p for p in parts if p != "full"), "chapters.py")
