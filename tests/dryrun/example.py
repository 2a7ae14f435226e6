"""A record with every key, of no program."""

import copy
from typing import Any

from moe.dryrun.collectives import KINDS

GIB = 2**30

_RECORD: dict[str, Any] = {
    "target": "v5p-128",
    "devices": 64,
    "mesh": {"fsdp": 8, "expert": 8},
    "rules": "hybrid",
    "dispatch": {"name": "grouped", "chunks": 1},
    "tokens": 262_144,
    "model": {"parameters_total": 46_702_792_704, "parameters_active": 12_879_925_248},
    "seconds_to_compile": 368.7,
    "versions": {"jax": "0"},
    "memory": {
        "limit": 95.0 * GIB,
        "state": {"params": 3 * GIB, "router": 0, "optimizer": 6 * GIB},
        "fits": True,
        "total": 25 * GIB,
        "argument": 9 * GIB,
        "output": 9 * GIB,
        "alias": 9 * GIB,
        "temp": 16 * GIB,
        "generated_code": 0,
    },
    "waste": {"what": "10240 rows", "drops": 0.001, "padding": 0.2},
    "flops": {
        "compiled": 4.0e14,
        "ideal": 2.0e14,
        "ratio": 2.0,
        "recompute_ideal": 5.0e13,
        "causal_saving": 1.0e13,
        "kernel_share": 0.8,
        "tile_padding": 0.05,
        "phases": {"forward": 1.0e14, "backward": 3.0e14},
        "parts_ideal": {"experts": 2.0e14},
        "places": {"moe/model/experts.py:65 dot (forward)": 3.0e14},
    },
    "memory_traffic": 10**12,
    "collectives": {
        "rows": [
            {
                "kind": kind,
                "axes": ["expert"],
                "phase": "forward",
                "source": "moe/dispatch/transfer.py:101",
                "purpose": "exchange",
                "count": 64,
                "bytes": 3_758_096_384,
            }
            for kind in (KINDS[4], KINDS[3])
        ],
        "sums": {
            "exchange": 7_516_192_768,
            "parameters and gradients": 40_000,
            "activations": 0,
            "statistics": 12,
        },
        "least": {"exchange": 3_758_096_384.0, "parameters and gradients": 20_000.0},
        "least_of": {"exchange": {"purpose": "exchange", "bytes": 1.0, "formula": ""}},
        "exchange_ratio": 2.0,
        "parameters_ratio": 2.0,
        "largest_weight_gather": 0.25,
    },
    "unknown_loops": [],
    "peak": {"bytes": 10 * GIB, "at": "fusion", "by": {"temporaries": 9 * GIB, "activations": GIB}},
    "buffers": [
        {
            "bytes": 2 * GIB,
            "shape": "f32[8,4096,16384]",
            "phase": "recompute",
            "source": "",
            "op": "jit(train_step)/dot_general",
        }
    ],
    "roofline": {
        "compute": 0.9,
        "memory": 0.6,
        "network": 0.2,
        "slow_network": 0.0,
        "step": 0.9,
        "bound": "compute",
        "in_turn": 1.7,
        "tokens_per_second": 291_271.0,
        "utilisation": 0.5,
        "source": "https://example.org",
    },
    "advice": ["The step computes 2.00 times the least."],
    "config": "configs/scaling.py:mixtral_8x7b",
    "overrides": {"mesh.rules": "hybrid"},
}
OF_A_TEXT = (
    *("flops", "memory_traffic", "collectives", "unknown_loops", "peak", "buffers", "roofline"),
)


def record(**more: Any) -> dict[str, Any]:
    """A copy, with other values for some keys."""
    return copy.deepcopy(_RECORD) | more


def refused(compiler: str = "RESOURCE_EXHAUSTED: Ran out of memory\nlong list") -> dict[str, Any]:
    """The record of a step that did not compile."""
    found = {key: value for key, value in record().items() if key not in OF_A_TEXT}
    memory = {key: found["memory"][key] for key in ("limit", "state")}
    return found | {"memory": memory | {"fits": False, "compiler": compiler}}
