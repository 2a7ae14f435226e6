"""Language in many domains: which expert takes novels, scripture, code, German, Chinese?

    python3 scripts/prepare_data.py novels scripture german chinese dictionary news reviews
    python3 train.py --config=configs/domains.py --workdir=runs/domains
    python3 eval.py --workdir=runs/domains --split=test

Bytes of ten domains at equal weight, held out by whole document.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit aad96ae, 6 minutes on one of two busy cores, one seed): bits per byte 2.618 (2.610 to
2.626).
"""

from moe.config import ConfigDict, default_config, import_beside

SOURCES = ("novels", "scripture", "stdlib", "german", "chinese", "dictionary", "news", "reviews")
DOMAINS = (
    *("novels", "scripture_en", "scripture_es", "code", "prose"),
    *("german", "chinese", "dictionary", "news", "reviews"),
)
BYTES = 500_000  # of each domain and split at most: a run sees less

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 500
    config.model.update({"num_layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32})
    config.model.update({"num_experts": 16, "expert_width": 96})
    config.router.k = 4
    name = "mix:" + ",".join(f"{source}@{BYTES}" for source in SOURCES)
    config.data.update({"name": name, "batch_size": 16, "sequence_length": 256})
    with config.ignore_type():
        config.data.weights = dict.fromkeys(DOMAINS, 1.0)
        config.evaluation.update({"every": 250, "batches": 40})
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 50})
    config.checkpoint.every = 250
    return twins.apply(config, arg, "domains.py")
