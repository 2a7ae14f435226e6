"""Token choice by softmax, sigmoid and biased scores, and variable numbers of experts a token."""

import math

from moe.config import import_beside

common = import_beside(__file__, "common.py")


def switch(size: common.Size) -> common.Sections:
    """Switch Transformers. Fedus, Zoph and Shazeer 2022, arXiv:2101.03961.

    One expert a token. Published: input jitter 1e-2, balance 1e-2.
    """
    return common.preset(
        "switch", {"k": 1, "jitter": 1e-2}, balance=1e-2, balance_scope="microbatch"
    )


def gshard(size: common.Size) -> common.Sections:
    """GShard. Lepikhin et al. 2021, arXiv:2006.16668.

    Two experts, the second by chance of twice its gate. Published: a balance loss that counts first
    choices; its weight of 1e-2 is ours. Seating first choices before second ones is left out: it is
    noncausal (`dispatch.priority`).
    """
    router = {"k": 2, "policy": "random", "eval_policy": "all", "threshold": 0.5}
    return common.preset(
        "gshard", router, balance=1e-2, balance_counts="first", balance_scope="microbatch"
    )


def noisy_topk(size: common.Size) -> common.Sections:
    """Sparsely-gated mixture of experts. Shazeer et al. 2017, arXiv:1701.06538.

    Learned noise. Published: importance and load losses 0.1 each, both kernels start at zero.
    """
    router = {"k": size.k, "noise": "learned", "init": "zeros", "load_threshold": "paper"}
    return common.preset("noisy_topk", router, importance=0.1, load=0.1)


def vmoe(size: common.Size) -> common.Sections:
    """Vision MoE. Riquelme et al. 2021, arXiv:2106.05974.

    Fixed noise of 1/E, gates of the softmax over all experts. Released: importance and load losses
    0.005 each. Batch-prioritised seating is left out: it is noncausal.
    """
    router = {"k": size.k, "noise": "fixed", "init": "normal", "normalize": "none"}
    return common.preset(
        "noisy_topk", router | {"load_threshold": "vmoe"}, importance=0.005, load=0.005
    )


def topk(size: common.Size) -> common.Sections:
    """Top-k with the losses of this project's defaults: global balance 1e-2, z 1e-3. Ours."""
    return common.preset("topk", {"k": size.k}, balance=1e-2, balance_scope="global", z=1e-3)


def olmoe(size: common.Size) -> common.Sections:
    """OLMoE. Muennighoff et al. 2024, arXiv:2409.02060.

    Raw softmax gates. Published: top-8 of 64, balance 1e-2, z 1e-3. Here k stays the config's.
    """
    router = {"k": size.k, "normalize": "none"}
    return common.preset("topk", router, balance=1e-2, balance_scope="microbatch", z=1e-3)


def mixtral(size: common.Size) -> common.Sections:
    """Mixtral of Experts. Jiang et al. 2024, arXiv:2401.04088.

    Softmax of the chosen logits. Published: top-2 of 8, the quickstart's share; the balance weight,
    which the paper does not give, is ours.
    """
    router = {"k": size.k, "normalize": "topk_softmax"}
    return common.preset("topk", router, balance=1e-2, balance_scope="microbatch")


def qwen3(size: common.Size) -> common.Sections:
    """Qwen3. Yang et al. 2025, arXiv:2505.09388; the loss is Qiu et al. 2025, arXiv:2501.11873.

    Renormalised softmax gates, balance over the global batch. Published: top-8 of 128, no shared
    expert; the weight 1e-3 is ours. Here k stays the config's.
    """
    router = {"k": size.k, "normalize": "renormalize"}
    return common.preset("topk", router, balance=1e-3, balance_scope="global")


def deepseek_v2(size: common.Size) -> common.Sections:
    """DeepSeek-V2. DeepSeek-AI 2024, arXiv:2405.04434.

    Published: 6 of 160 experts in at most 3 of 8 devices, gates x 16, losses 0.003, 0.05 and 0.02 for
    experts, devices and communication. Here groups are the largest divisor of E up to 8, kept in the
    same share of 3/8 or as many as hold k; gates x E / 10, so that their mean is the paper's.
    """
    groups = common.divisor(size.num_experts, 8)
    kept = max(math.ceil(3 * groups / 8), math.ceil(size.k * groups / size.num_experts))
    router = {"k": size.k, "groups": groups, "groups_kept": kept, "scale": size.num_experts / 10}
    return common.preset(
        "deepseek_v2",
        router,
        balance=0.003,
        balance_scope="sequence",
        device_balance=0.05,
        communication_balance=0.02,
    )


def deepseek_v3(size: common.Size) -> common.Sections:
    """DeepSeek-V3. DeepSeek-AI 2024, arXiv:2412.19437; the bias is Wang et al. 2024, arXiv:2408.15664.

    Published: 8 of 256 experts in 4 of 8 groups, gates x 2.5, bias rate 1e-3, no balance loss but 1e-4
    over sequences. Here groups are the largest divisor of E up to 8, half of them kept, or as many
    as hold k.
    """
    groups = common.divisor(size.num_experts, 8)
    kept = max(math.ceil(groups / 2), math.ceil(size.k * groups / size.num_experts))
    router = {"k": size.k, "groups": groups, "groups_kept": kept, "scale": 2.5, "bias_rate": 1e-3}
    return common.preset("deepseek_v3", router, sequence_balance=1e-4)


def quantile(size: common.Size) -> common.Sections:
    """Quantile balancing of Megatron-LM, github.com/NVIDIA/Megatron-LM/pull/5349.

    The bias that balances is solved for. There, and here: no loss at all.
    """
    return common.preset("quantile", {"k": size.k})


# Variable numbers of experts a token.


def top_p(size: common.Size) -> common.Sections:
    """Harder Tasks Need More Experts. Huang et al. 2024, arXiv:2403.07652.

    Published: experts up to a probability of 0.4, a balance loss and an entropy loss against growing
    k; their weights 1e-2 and 1e-4 are ours. k is only where reports of cost start.
    """
    return common.preset("top_p", {"k": size.k, "mass": 0.4}, balance=1e-2, entropy=1e-4)


def dynmoe(size: common.Size) -> common.Sections:
    """Dynamic Mixture of Experts. Guo et al. 2024, arXiv:2405.14297.

    A learned threshold for each expert. Its losses on the gate's columns are left out; balance 1e-2 is ours.
    """
    return common.preset("dynmoe", {"k": size.k}, balance=1e-2)


def remoe(size: common.Size) -> common.Sections:
    """ReMoE. Wang, Zhu and Chen 2025, arXiv:2412.14711.

    ReLU gates. Published: lambda from 1e-8, x 1.2 or / 1.2 each step, an L1 loss weighed by load.
    """
    router = {"k": size.k, "lambda_init": 1e-8, "lambda_factor": 1.2}
    return common.preset("relu", router, relu_balance=1.0)


def relu(size: common.Size) -> common.Sections:
    """ReLU routing with the plain L1 loss of arXiv:2412.14711, without its balance term."""
    router = {"k": size.k, "lambda_init": 1e-8, "lambda_factor": 1.2}
    return common.preset("relu", router, relu_l1=1.0)


def dselect_k(size: common.Size) -> common.Sections:
    """DSelect-k. Hazimeh et al. 2021, arXiv:2106.03760.

    Published: smooth step of width 1. Its entropy term is left out; all experts work at first, so that
    early steps cost more than k experts.
    """
    return common.preset("dselect_k", {"k": size.k, "selector": "linear", "step_width": 1.0})


PRESETS = (
    *(switch, gshard, noisy_topk, vmoe, topk, olmoe, mixtral, qwen3),
    *(deepseek_v2, deepseek_v3, quantile),
    *(top_p, dynmoe, remoe, relu, dselect_k),
)
