"""Shapes of models that other configs import: `config.model.update(models.olmoe_1b_7b())`.

There, `models = import_beside(__file__, "models.py")`, of `moe.config`.

The public shapes have the parameter counts of the released checkpoints (a test holds them equal):
OLMoE-1B-7B (Muennighoff et al. 2024, arXiv:2409.02060), Mixtral-8x7B (Jiang et al. 2024,
arXiv:2401.04088), Qwen3-30B-A3B (Yang et al. 2025, arXiv:2505.09388).
"""

from typing import Any


def tiny() -> dict[str, Any]:
    """For tests: a forward and backward pass in milliseconds."""
    return {
        "num_layers": 2,
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "mlp_width": 64,
        "expert_width": 32,
        "num_experts": 8,
    }


def small() -> dict[str, Any]:
    """For a CPU: 6 layers of width 256; sparse every second layer."""
    return {
        "num_layers": 6,
        "width": 256,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 64,
        "mlp_width": 1024,
        "expert_width": 512,
        "num_experts": 8,
        "pattern": ("dense", "sparse"),
    }


def olmoe_1b_7b() -> dict[str, Any]:
    """OLMoE-1B-7B: 6.92B parameters, 1.28B active; vocabulary 50,304, top-8 of 64, raw softmax gates."""
    return {
        "num_layers": 16,
        "width": 2048,
        "heads": 16,
        "kv_heads": 16,
        "head_dim": 128,
        "expert_width": 1024,
        "num_experts": 64,
        "qk_norm": "full",
        "dtype": "bfloat16",
        "remat": "full",
    }


def mixtral_8x7b() -> dict[str, Any]:
    """Mixtral-8x7B: 46.7B parameters, 12.9B active; vocabulary 32,000, top-2 of 8."""
    return {
        "num_layers": 32,
        "width": 4096,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "expert_width": 14336,
        "num_experts": 8,
        "rope_base": 1e6,
        "dtype": "bfloat16",
        "remat": "full",
    }


def qwen3_30b_a3b() -> dict[str, Any]:
    """Qwen3-30B-A3B: 30.5B parameters, 3.3B active; vocabulary 151,936, top-8 of 128."""
    return {
        "num_layers": 48,
        "width": 2048,
        "heads": 32,
        "kv_heads": 4,
        "head_dim": 128,
        "expert_width": 768,
        "num_experts": 128,
        "qk_norm": "head",
        "rope_base": 1e6,
        "norm_eps": 1e-6,
        "dtype": "bfloat16",
        "remat": "full",
    }


def deepseek_v3_gqa() -> dict[str, Any]:
    """The shape of DeepSeek-V3 with grouped queries for its latent attention: 671B parameters, 38B active.

    61 layers, the first 3 dense; top-8 of 256 experts and one shared; vocabulary 129,280 (DeepSeek-AI
    2024, arXiv:2412.19437, section 4.2). The released model's attention is smaller.
    """
    return {
        "num_layers": 61,
        "first_dense": 3,
        "width": 7168,
        "heads": 128,
        "kv_heads": 8,
        "head_dim": 128,
        "mlp_width": 18432,
        "expert_width": 2048,
        "num_experts": 256,
        "shared_experts": 1,
        "norm_eps": 1e-6,
        "dtype": "bfloat16",
        "remat": "full",
    }
