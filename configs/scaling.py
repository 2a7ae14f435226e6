"""Public models on the pods they would be trained on, to be dry-run before anyone pays.

    python3 scripts/dryrun.py --config=configs/scaling.py:olmoe_1b_7b --topology=v5e-64

The argument is a row of `RUNS`, whose comment names its topology. Rows of 4,096 tokens of a vocabulary of
the released size; float32 parameters, bfloat16 compute, everything but routing decisions recomputed. What
they need and reach on paper is in docs/scaling.md.
"""

from typing import Any

from moe.config import ConfigDict, default_config, import_beside, nearest
from moe.errors import ConfigError

models = import_beside(__file__, "models.py")
routers = import_beside(__file__, "routers.py")

# name -> (model, router preset, k, vocabulary, sections that differ from what all share)
RUNS: dict[str, tuple[str, str, int, int, dict[str, dict[str, Any]]]] = {
    # v5e-64: one expert a chip; the chips of the expert axis also hold the parts of everything else.
    # v5e has no ragged all-to-all: even parts, a little larger than balance asks for.
    "olmoe_1b_7b": (
        *("olmoe_1b_7b", "olmoe", 8, 50_304),
        {
            "mesh": {"data": 1, "expert": 64, "rules": "folded"},
            "data": {"batch_size": 64},
            "dispatch": {"exchange": "all_to_all", "buffer_factor": 1.09},
        },
    ),
    # v5p-128, which is 64 chips: 8 experts, each cut over 8 chips and gathered when used.
    "mixtral_8x7b": (
        *("mixtral_8x7b", "mixtral", 2, 32_000),
        {
            "mesh": {"data": 1, "fsdp": 8, "expert": 8, "rules": "hybrid"},
            "data": {"batch_size": 64},
        },
    ),
    # v6e-256: one expert a chip, twice.
    "qwen3_30b_a3b": (
        *("qwen3_30b_a3b", "qwen3", 8, 151_936),
        {
            "mesh": {"data": 1, "fsdp": 2, "expert": 128, "rules": "hybrid"},
            "data": {"batch_size": 256},
        },
    ),
    # v5p:8x16x16, 2,048 chips: one expert a chip, cut over 8. Everything else is cut over 8 only: a
    # width of 7,168 has no 2,048 parts.
    "deepseek_v3_gqa": (
        *("deepseek_v3_gqa", "deepseek_v3", 8, 129_280),
        {
            "mesh": {"data": 1, "fsdp": 8, "expert": 256, "rules": "separate"},
            "data": {"batch_size": 2048},
        },
    ),
    # h100-8: one expert a GPU. Moments in bfloat16, or 80 GB do not hold the state.
    "mixtral_8x7b_h100": (
        *("mixtral_8x7b", "mixtral", 2, 32_000),
        {
            "mesh": {"data": 1, "expert": 8, "rules": "folded"},
            "data": {"batch_size": 8},
            "optimizer": {"moment_dtype": "bfloat16"},
        },
    ),
}


def get_config(arg: str = "olmoe_1b_7b") -> ConfigDict:
    """The run of that name."""
    if arg not in RUNS:
        raise ConfigError(
            f"argument {arg!r} of configs/scaling.py is no run; {nearest(arg, RUNS)}. There are "
            f"{', '.join(RUNS)}."
        )
    model, router, k, vocabulary, sections = RUNS[arg]
    config = default_config()
    config.model.update(getattr(models, model)())
    config.router.k = k
    routers.apply(config, router)
    config.data.update({"sequence_length": 4096, "tokenizer": "bpe"})
    with config.ignore_type():
        config.data.vocab_size = vocabulary
        config.dispatch.buffer_factor = 1.25
    config.dispatch.exchange = "ragged"
    for section, values in sections.items():
        config[section].update(values)
    return config
