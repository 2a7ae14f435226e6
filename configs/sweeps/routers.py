"""Every router on the same model, text, seeds and active FLOPs, beside dense models.

    python3 scripts/compare_routers.py --config=configs/sweeps/routers.py --workdir=runs/routers --workers=2
    python3 scripts/compare_routers.py --config=configs/sweeps/routers.py:beyond --workdir=runs/beyond
    python3 scripts/compare_routers.py --config=configs/sweeps/routers.py:classify --workdir=runs/classify

The first trains every preset of configs/routers.py that suits a causal language model: routers that are
C0 or C1, and those C3 whose evaluation form is causal, which train with `allow_noncausal` and report the
causal gap. Arms train on the domain `code` alone; `prose`, which none of them has seen, gives the
out-of-domain loss. The second compares what routes elsewhere than in the feed-forward, beside the same
top-k. The third names the domain of every row, on all domains, with all C3 routers and
four references.

`ARMS` takes what is no preset, name -> (argument of configs/comparison.py, overrides).
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe.config import import_beside
from moe.routing.table import ROUTERS

presets = import_beside(str(Path(__file__).parent), "routers.py")

# Left out: text has no modalities, so that these are top-k with fewer experts; and presets that are the
# same function as another arm, with another loss weight or another draw in evaluation.
NO_MODALITIES = ("modality_pools", "limoe")
SAME = ("mixtral", "qwen3", "relu", "gumbel_sampled", "random_path_sampled")

GROUPS = {
    "softmax top-k": "switch gshard noisy_topk vmoe topk olmoe mixtral qwen3",
    "biased or limited": "deepseek_v2 deepseek_v3 quantile",
    "variable k": "top_p dynmoe remoe relu dselect_k bernoulli",
    "other gates": "cosine query_key expert_attention product_key residual recurrent prior",
    "assignment": "expert_choice base sinkhorn",
    "fixed": "hash hash_balanced bigram_hash position position_weighted",
    "random": "random thor smoe_dropout gumbel gumbel_sampled reinforce random_path"
    " random_path_sampled noisy_weights",
    "soft": "soft_moe smear lory",
    "two levels": "two_level balanced_groups",
    "segments": "segment segment_self document_pool document_pool_whole",
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),  # equal active FLOPs
    "dense_total": ("dense_total", {}),  # equal total parameters
}
# Of language models: what is no preset.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    # Two routing layers in a block, each with half of the compute.
    "double": ("router=topk", {"model.pattern": ("double",), "model.expert_width": 16}),
}

# Routing elsewhere than in the feed-forward, all with the same top-k there.
BEYOND: dict[str, dict[str, Any]] = {
    "topk": {},
    "attention_block": {"attention.name": "block", "attention.block": 16},
    "attention_kmeans": {"attention.name": "kmeans", "losses.commitment": 1e-4},
    "attention_segment": {"attention.name": "segment", "attention.segment": 32},
    "depth": {
        "model.pattern": ("depth_sparse",),
        "model.depth_capacity": 0.5,
        "losses.predictor": 0.1,
        "allow_noncausal": True,
    },
    "skips": {"paths.survival": 0.8},
    "jumps": {"paths.jump": 0.5},
    "free_experts": {"model.zero_experts": 1, "model.copy_experts": 1, "model.constant_experts": 2},
    "noise_relative": {"weight_noise.target": "experts", "weight_noise.scale": 0.1},
    "noise_literal": {
        "weight_noise.target": "experts",
        "weight_noise.mode": "literal",
        "weight_noise.scale": 1.0,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arms of the language model, with `beyond` or `classify` those of the other comparisons."""
    config = ConfigDict(convert_dict=False)  # the keys of overrides have dots
    config.base = "configs/comparison.py"
    config.reference = "dense"
    config.seeds = (0, 1, 2)
    if arg == "classify":
        config.name = "Routers that read whole rows"
        config.arms = _with_groups({f"{n}": _classify(n) for n in _classifiers()})
    elif arg == "beyond":
        config.name = "Routing beyond the feed-forward"
        arms = {name: ("router=topk", overrides) for name, overrides in BEYOND.items()}
        config.arms = _with_groups({"dense": DENSE["dense"], **arms})
        config.in_domain, config.out_of_domain = "code", "prose"
    else:
        config.name = "Routers in a causal language model"
        config.arms = _with_groups({**DENSE, **_language(), **ARMS})
        config.in_domain, config.out_of_domain = "code", "prose"
    return config


def _language() -> dict[str, tuple[str, dict[str, Any]]]:
    arms, seen = {}, []
    for name in presets.PRESETS:
        sections = presets.get(name)
        row = ROUTERS[sections["router"]["name"]]
        if name in (*NO_MODALITIES, *SAME) or sections in seen:
            continue
        if row.causality == "C3" and not row.causal_in_eval:
            continue
        seen.append(sections)
        arms[name] = (f"router={name}", {"allow_noncausal": True} if row.causality == "C3" else {})
    return arms


def _classifiers() -> list[str]:
    noncausal = [
        name
        for name in presets.PRESETS
        if ROUTERS[presets.get(name)["router"]["name"]].causality == "C3"
    ]
    return ["dense", "dense_total", "topk", "random", *noncausal]


def _classify(name: str) -> tuple[str, dict[str, Any]]:
    argument = name if name in DENSE else f"router={name}"
    return f"{argument},classify", {}


def _with_groups(arms: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    def group(name: str) -> str:
        return "dense" if name in DENSE else GROUP_OF.get(name, "other")

    return {
        name: {"argument": argument, "overrides": overrides, "group": group(name)}
        for name, (argument, overrides) in arms.items()
    }
