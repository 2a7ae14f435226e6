"""One preset for every router: the settings of its paper, fitted to the config at hand.

    python3 train.py --config=configs/quickstart.py:router=deepseek_v3 --workdir=runs/deepseek_v3

A preset sets `router` and the weights of all `losses` (0 for what the paper does not use) and nothing else,
with one exception: where a method fixes `router.k`, `model.expert_width` changes so that k x expert_width, the
active compute of a token, stays what it was. Published numbers that hang on the number of experts are
scaled, and a label says how. Where it says "ours" no published number exists, or none that was checked.

Capacity, shared experts and schedules are other sections' and stay as they are. Routers that are noncausal
(C3) train a language model only with `--config.allow_noncausal=true`.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

from moe.config import ConfigDict, nearest, replace_section
from moe.errors import ConfigError
from moe.routing.loss_table import LOSSES

Sections = dict[str, dict[str, Any]]


class Size(NamedTuple):
    """What a preset is fitted to; the defaults are those of configs/quickstart.py."""

    num_experts: int = 16
    k: int = 4
    sequence_length: int = 256
    steps: int = 200


def get(name: str, size: Size | None = None) -> Sections:
    """The config sections of a preset.

    Args:
        name: a key of `PRESETS`.
        size: what it is fitted to; None stands for the quickstart's.

    Raises:
        ConfigError: no such preset; names the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"router={name!r} is no preset of configs/routers.py: {nearest(name, PRESETS)}; there are "
            f"{', '.join(PRESETS)}."
        )
    return PRESETS[name](size or Size())


def apply(config: ConfigDict, name: str) -> None:
    """Gives a config the router of a preset, at equal active compute.

    Args:
        config: changed in place: `router`, `losses`, and `model.expert_width` if the preset's k differs.
        name: a key of `PRESETS`.

    Raises:
        ConfigError: no such preset, or no whole expert width of equal compute.
    """
    m, k = config.model, config.router.k
    size = Size(m.num_experts, k, config.data.sequence_length, config.steps)
    sections = get(name, size)
    own = sections["router"]["k"]
    if k * m.expert_width % own:
        raise ConfigError(
            f"router={name!r} takes router.k={own} experts, of which none has a whole width of equal "
            f"compute: router.k={k} x model.expert_width={m.expert_width} is not divisible by {own}. "
            "Change model.expert_width."
        )
    m.expert_width = k * m.expert_width // own
    replace_section(config, "router", sections["router"])
    config.losses.update(sections["losses"])


def _preset(name: str, router: dict[str, Any], **losses: Any) -> Sections:
    """Sections of a preset; a loss that is not named has weight 0."""
    zeros = dict.fromkeys(LOSSES, 0.0)
    return {"router": {"name": name, "jitter": 0.0, **router}, "losses": {**zeros, **losses}}


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(d for d in range(1, most + 1) if number % d == 0)


# Token choice: softmax, sigmoid and biased scores.


def switch(size: Size) -> Sections:
    """Switch Transformers. Fedus, Zoph and Shazeer 2022, arXiv:2101.03961.

    One expert a token. Published: input jitter 1e-2, balance 1e-2.
    """
    return _preset("switch", {"k": 1, "jitter": 1e-2}, balance=1e-2, balance_scope="microbatch")


def gshard(size: Size) -> Sections:
    """GShard. Lepikhin et al. 2021, arXiv:2006.16668.

    Two experts, the second by chance of twice its gate. Published: a balance loss that counts first
    choices; its weight of 1e-2 is ours. Seating first choices before second ones is left out: it is
    noncausal (`dispatch.priority`).
    """
    router = {"k": 2, "policy": "random", "eval_policy": "all", "threshold": 0.5}
    return _preset(
        "gshard", router, balance=1e-2, balance_counts="first", balance_scope="microbatch"
    )


def noisy_topk(size: Size) -> Sections:
    """Sparsely-gated mixture of experts. Shazeer et al. 2017, arXiv:1701.06538.

    Learned noise. Published: importance and load losses 0.1 each, both kernels start at zero.
    """
    router = {"k": size.k, "noise": "learned", "init": "zeros", "load_threshold": "paper"}
    return _preset("noisy_topk", router, importance=0.1, load=0.1)


def vmoe(size: Size) -> Sections:
    """Vision MoE. Riquelme et al. 2021, arXiv:2106.05974.

    Fixed noise of 1/E, gates of the softmax over all experts. Released: importance and load losses
    0.005 each. Batch-prioritised seating is left out: it is noncausal.
    """
    router = {"k": size.k, "noise": "fixed", "init": "normal", "normalize": "none"}
    return _preset("noisy_topk", router | {"load_threshold": "vmoe"}, importance=0.005, load=0.005)


def topk(size: Size) -> Sections:
    """Top-k with the losses of this project's defaults: global balance 1e-2, z 1e-3. Ours."""
    return _preset("topk", {"k": size.k}, balance=1e-2, balance_scope="global", z=1e-3)


def olmoe(size: Size) -> Sections:
    """OLMoE. Muennighoff et al. 2024, arXiv:2409.02060.

    Raw softmax gates. Published: top-8 of 64, balance 1e-2, z 1e-3. Here k stays the config's.
    """
    router = {"k": size.k, "normalize": "none"}
    return _preset("topk", router, balance=1e-2, balance_scope="microbatch", z=1e-3)


def mixtral(size: Size) -> Sections:
    """Mixtral of Experts. Jiang et al. 2024, arXiv:2401.04088.

    Softmax of the chosen logits. Published: top-2 of 8, the quickstart's share; the balance weight,
    which the paper does not give, is ours.
    """
    router = {"k": size.k, "normalize": "topk_softmax"}
    return _preset("topk", router, balance=1e-2, balance_scope="microbatch")


def qwen3(size: Size) -> Sections:
    """Qwen3. Yang et al. 2025, arXiv:2505.09388; the loss is Qiu et al. 2025, arXiv:2501.11873.

    Renormalised softmax gates, balance over the global batch. Published: top-8 of 128, no shared
    expert; the weight 1e-3 is ours. Here k stays the config's.
    """
    router = {"k": size.k, "normalize": "renormalize"}
    return _preset("topk", router, balance=1e-3, balance_scope="global")


def deepseek_v2(size: Size) -> Sections:
    """DeepSeek-V2. DeepSeek-AI 2024, arXiv:2405.04434.

    Published: 6 of 160 experts in at most 3 of 8 devices, gates x 16, losses 0.003, 0.05 and 0.02 for
    experts, devices and communication. Here groups are the largest divisor of E up to 8, kept in the
    same share of 3/8 or as many as hold k; gates x E / 10, so that their mean is the paper's.
    """
    groups = _divisor(size.num_experts, 8)
    kept = max(math.ceil(3 * groups / 8), math.ceil(size.k * groups / size.num_experts))
    router = {"k": size.k, "groups": groups, "groups_kept": kept, "scale": size.num_experts / 10}
    return _preset(
        "deepseek_v2",
        router,
        balance=0.003,
        balance_scope="sequence",
        device_balance=0.05,
        communication_balance=0.02,
    )


def deepseek_v3(size: Size) -> Sections:
    """DeepSeek-V3. DeepSeek-AI 2024, arXiv:2412.19437; the bias is Wang et al. 2024, arXiv:2408.15664.

    Published: 8 of 256 experts in 4 of 8 groups, gates x 2.5, bias rate 1e-3, no balance loss but 1e-4
    over sequences. Here groups are the largest divisor of E up to 8, half of them kept, or as many
    as hold k.
    """
    groups = _divisor(size.num_experts, 8)
    kept = max(math.ceil(groups / 2), math.ceil(size.k * groups / size.num_experts))
    router = {"k": size.k, "groups": groups, "groups_kept": kept, "scale": 2.5, "bias_rate": 1e-3}
    return _preset("deepseek_v3", router, sequence_balance=1e-4)


def quantile(size: Size) -> Sections:
    """Quantile balancing of Megatron-LM, github.com/NVIDIA/Megatron-LM/pull/5349.

    The bias that balances is solved for. There, and here: no loss at all.
    """
    return _preset("quantile", {"k": size.k})


# Variable numbers of experts a token.


def top_p(size: Size) -> Sections:
    """Harder Tasks Need More Experts. Huang et al. 2024, arXiv:2403.07652.

    Published: experts up to a probability of 0.4, a balance loss and an entropy loss against growing
    k; their weights 1e-2 and 1e-4 are ours. k is only where reports of cost start.
    """
    return _preset("top_p", {"k": size.k, "mass": 0.4}, balance=1e-2, entropy=1e-4)


def dynmoe(size: Size) -> Sections:
    """Dynamic Mixture of Experts. Guo et al. 2024, arXiv:2405.14297.

    A learned threshold for each expert. Its losses on the gate's columns are left out; balance 1e-2 is ours.
    """
    return _preset("dynmoe", {"k": size.k}, balance=1e-2)


def remoe(size: Size) -> Sections:
    """ReMoE. Wang, Zhu and Chen 2025, arXiv:2412.14711.

    ReLU gates. Published: lambda from 1e-8, x 1.2 or / 1.2 each step, an L1 loss weighed by load.
    """
    router = {"k": size.k, "lambda_init": 1e-8, "lambda_factor": 1.2}
    return _preset("relu", router, relu_balance=1.0)


def relu(size: Size) -> Sections:
    """ReLU routing with the plain L1 loss of arXiv:2412.14711, without its balance term."""
    router = {"k": size.k, "lambda_init": 1e-8, "lambda_factor": 1.2}
    return _preset("relu", router, relu_l1=1.0)


def dselect_k(size: Size) -> Sections:
    """DSelect-k. Hazimeh et al. 2021, arXiv:2106.03760.

    Published: smooth step of width 1. Its entropy term is left out; all experts work at first, so that
    early steps cost more than k experts.
    """
    return _preset("dselect_k", {"k": size.k, "selector": "linear", "step_width": 1.0})


# Other gates.


def cosine(size: Size) -> Sections:
    """X-MoE. Chi et al. 2022, arXiv:2204.09179.

    Published: E/2 dimensions, learned temperature from 0.3 with softmax gates; balance 1e-2.
    """
    return _preset("cosine", {"k": size.k, "score": "softmax"}, balance=1e-2)


def query_key(size: Size) -> Sections:
    """Keys as in Lample et al. 2019, arXiv:1907.05242, compared with all experts; balance 1e-2 is ours."""
    return _preset("query_key", {"k": size.k}, balance=1e-2)


def expert_attention(size: Size) -> Sections:
    """Yuan 2.0-M32. Wu et al. 2024, arXiv:2405.17976.

    Published: top-2 of 32, softmax of the chosen. Here k stays the config's; balance 1e-2 is ours.
    """
    router = {"k": size.k, "normalize": "topk_softmax"}
    return _preset("expert_attention", router, balance=1e-2)


def product_key(size: Size) -> Sections:
    """PEER. He 2024, arXiv:2407.04153.

    Published: 8 heads with 16 experts each of 1024^2; no loss. Here k stays the config's, in as many heads of
    at least 2 experts as divide it, up to 8. E must be a square.
    """
    heads = _divisor(size.k, min(8, max(1, size.k // 2)))
    return _preset("product_key", {"k": size.k, "heads": heads})


def residual(size: Size) -> Sections:
    """MoE++. Jin et al. 2024, arXiv:2410.07348.

    Logits build on the layer below. Published: balance 1e-2. Its zero-computation experts are the model's.
    """
    return _preset("residual", {"k": size.k}, balance=1e-2)


def recurrent(size: Size) -> Sections:
    """RMoE. Qiu et al. 2025, arXiv:2408.06793.

    A GRU over depth. The size of its state, 64, and balance 1e-2 are ours.
    """
    return _preset("recurrent", {"k": size.k, "memory_width": 64}, balance=1e-2)


# Assignment, and fixed tables.


def expert_choice(size: Size) -> Sections:
    """Expert Choice. Zhou et al. 2022, arXiv:2202.09368.

    Published: 2 experts a token on average, no loss. Here the average is the config's k. C3.
    """
    return _preset("expert_choice", {"k": size.k, "normalize": "experts"})


def base(size: Size) -> Sections:
    """BASE layers. Lewis et al. 2021, arXiv:2103.16716.

    Published: one expert, equal counts, no loss. C3.
    """
    return _preset("base", {"k": 1})


def sinkhorn(size: Size) -> Sections:
    """S-BASE. Clark et al. 2022, arXiv:2202.01169.

    Published: one expert, no loss. C3.
    """
    return _preset("sinkhorn", {"k": 1, "temperature": 1.0, "iterations": 30})


def hash(size: Size) -> Sections:
    """Hash layers. Roller et al. 2021, arXiv:2106.04426.

    A random table of token ids. Published: one expert; here k experts that share the gate.
    """
    return _preset("hash", {"k": size.k, "kind": "random"})


def hash_balanced(size: Size) -> Sections:
    """Hash layers with the balanced table of arXiv:2106.04426: frequent ids first, emptiest expert."""
    return _preset("hash", {"k": size.k, "kind": "balanced"})


def bigram_hash(size: Size) -> Sections:
    """Hash layers over bigrams, arXiv:2106.04426. The size of the shared table, 16384, is ours."""
    return _preset("bigram_hash", {"k": size.k, "buckets": 16384})


def position(size: Size) -> Sections:
    """Position modulo E, a control of this project; no paper."""
    return _preset("position", {"k": size.k, "kind": "strided"})


def position_weighted(size: Size) -> Sections:
    """Blocks of positions, each with a learned weight, a control of this project; no paper."""
    length = max(size.sequence_length, size.num_experts)
    return _preset("position_weighted", {"k": size.k, "kind": "block", "length": length})


# Random and learned by reward.


def random(size: Size) -> Sections:
    """Uniform choice for each token, the control. Zuo et al. 2022, arXiv:2110.04260, without its loss."""
    return _preset("random", {"k": size.k})


def thor(size: Size) -> Sections:
    """THOR. Zuo et al. 2022, arXiv:2110.04260.

    One random expert for the whole batch. Released: alpha = 5 between two passes, which cost twice the
    compute. Here the two cross-entropies are averaged, not added, and the weight is alpha / 2.
    """
    return _preset("thor", {"k": 1, "scope": "batch", "eval_mode": "token"}, consistency=2.5)


def smoe_dropout(size: Size) -> Sections:
    """SMoE-Dropout. Chen et al. 2023, arXiv:2303.01610.

    A frozen random gate. Published: from E/2 to E experts over the run. Here from k/2 to k, over the
    steps of the config, so that no step costs more than k experts.
    """
    router = {"k": size.k, "k_min": max(1, size.k // 2), "ramp_steps": size.steps}
    return _preset("smoe_dropout", router)


def gumbel(size: Size) -> Sections:
    """Sampling without replacement. Kool et al. 2019, arXiv:1903.06059.

    Unbiased importance weights. Balance 1e-2 and annealing over the steps of the config are ours.
    """
    return _preset("gumbel", _gumbel(size), balance=1e-2)


def gumbel_sampled(size: Size) -> Sections:
    """As `gumbel`, sampling in evaluation too."""
    return _preset("gumbel_sampled", _gumbel(size), balance=1e-2)


def _gumbel(size: Size) -> dict[str, Any]:
    gates = "raw" if size.k == size.num_experts else "importance"
    return {"k": size.k, "gates": gates, "tau": 1.0, "tau_end": 0.3, "anneal_steps": size.steps}


def reinforce(size: Size) -> Sections:
    """REINFORCE with a moving baseline. Bengio et al. 2015, arXiv:1511.06297; Rosenbaum et al. 2018.

    One expert, drawn. Weights 0.01 of the policy and 5e-4 of its entropy are the released ones of
    Muqeeth et al. 2023, arXiv:2306.03745.
    """
    router = {"k": 1, "gates": "one", "baseline": "ema"}
    return _preset("reinforce", router, policy=0.01, policy_entropy=5e-4)


def bernoulli(size: Size) -> Sections:
    """Conditional computation. Bengio et al. 2015, arXiv:1511.06297.

    Every expert on or off. Weights as `reinforce`; a price of 0.01 nats an expert is ours. The policy
    decides how many experts it uses.
    """
    router = {"k": size.k, "gates": "one", "baseline": "ema"}
    return _preset("bernoulli", router, policy=0.01, policy_penalty=0.01, policy_entropy=5e-4)


def random_path(size: Size) -> Sections:
    """Random paths, ours; kin to PathNet, arXiv:1701.08734, and routing networks, arXiv:1711.01239.

    As many paths as the config has experts a token; evaluation takes the most probable ones.
    """
    return _preset("random_path", {"k": size.k, "paths": size.k}, balance=1e-2)


def random_path_sampled(size: Size) -> Sections:
    """As `random_path`, drawing paths in evaluation too."""
    return _preset("random_path_sampled", {"k": size.k, "paths": size.k}, balance=1e-2)


def noisy_weights(size: Size) -> Sections:
    """NoisyNets. Fortunato et al. 2018, arXiv:1706.10295, on the gate's kernel.

    Published: factorised noise, learned sigma from 0.5 / sqrt(D), scale 1. Balance 1e-2 is ours.
    """
    router = {"k": size.k, "noise_mode": "factorised", "noise_scale": 1.0}
    return _preset("noisy_weights", router, balance=1e-2)


def prior(size: Size) -> Sections:
    """A prior over modules, ours; Hedge is Freund and Schapire 1997, EXP3 Auer et al. 2002."""
    return _preset("prior", {"k": size.k, "prior_weight": 1.0}, balance=1e-2)


# Soft: mixtures of tokens or of parameters.


def soft_moe(size: Size) -> Sections:
    """Soft MoE. Puigcerver et al. 2024, arXiv:2308.00951.

    Published: no loss; slots in proportion to tokens. Here S k / E slots an expert, the compute of k
    experts a token. C3.
    """
    slots = max(1, size.sequence_length * size.k // size.num_experts)
    return _preset("soft_moe", {"k": size.k, "slots": slots})


def smear(size: Size) -> Sections:
    """SMEAR. Muqeeth et al. 2023, arXiv:2306.03745.

    One merged expert a row. Published: expert dropout 0.1, no loss. C3.
    """
    return _preset("smear", {"k": 1, "dropout": 0.1})


def lory(size: Size) -> Sections:
    """Lory. Zhong et al. 2024, arXiv:2405.03133.

    One merged expert a segment. Published: segments of 256 tokens, no loss. Here at most a quarter of
    the row, so that most segments have one before them.
    """
    segment = _divisor(size.sequence_length, max(1, min(256, size.sequence_length // 4)))
    return _preset("lory", {"k": 1, "segment": segment})


# Two levels, segments, documents, modalities.


def two_level(size: Size) -> Sections:
    """SMILE. He et al. 2022, arXiv:2212.05191; hierarchies of experts are Jordan and Jacobs 1994.

    Groups first, experts inside them second. Published: one expert in one group. Here the best k / 2
    experts of each of 2 groups, if k is even and groups hold them, else k in one group; both levels'
    balance 1e-2 is ours.
    """
    groups = _divisor(size.num_experts, 4)
    kept = 2 if groups >= 2 and size.k % 2 == 0 and size.k > 2 else 1
    while size.k // kept > size.num_experts // groups:
        groups = _divisor(size.num_experts, groups - 1)
    kept = min(kept, groups)
    norm = "joint" if kept > 1 else "none"
    router = {"k": size.k, "groups": groups, "groups_kept": kept, "variant": "hard", "norm": norm}
    return _preset("two_level", router, group_balance=1e-2, within_group_balance=1e-2)


def balanced_groups(size: Size) -> Sections:
    """MoGE, in Pangu Pro MoE. Tang et al. 2025, arXiv:2505.21411.

    Published: 8 of 64 experts, one in each of 8 groups. Here groups are the largest number up to 8 that
    divides both E and k; balance inside groups 1e-2 is ours.
    """
    groups = _divisor(math.gcd(size.num_experts, size.k), 8)
    return _preset("balanced_groups", {"k": size.k, "groups": groups}, within_group_balance=1e-2)


def segment(size: Size) -> Sections:
    """Segment routing by the segment before. Kin to Lory, arXiv:2405.03133, and Seg-MoE, arXiv:2601.21641.

    Segments of a sixteenth of the row and balance 1e-2 are ours.
    """
    length = max(1, size.sequence_length // 16)
    router = {"k": size.k, "segment_size": length, "mode": "shift", "pool": "mean"}
    return _preset("segment", router, balance=1e-2)


def segment_self(size: Size) -> Sections:
    """Segment routing by the segment itself, as Seg-MoE, arXiv:2601.21641. Numbers as `segment`. C3."""
    length = max(1, size.sequence_length // 16)
    router = {"k": size.k, "segment_size": length, "pool": "mean"}
    return _preset("segment_self", router, balance=1e-2)


def document_pool(size: Size) -> Sections:
    """EMO made causal. Allen Institute for AI 2026, repository allenai/EMO.

    A document has a pool of E/2 experts, or k; that and balance 1e-2 are ours.
    """
    length = max(1, size.sequence_length // 16)
    router = {"k": size.k, "pool_size": _pool(size), "segment_size": length}
    return _preset("document_pool", router, balance=1e-2)


def document_pool_whole(size: Size) -> Sections:
    """EMO, repository allenai/EMO: a pool made of the whole document. Numbers as `document_pool`. C3."""
    return _preset("document_pool_whole", {"k": size.k, "pool_size": _pool(size)}, balance=1e-2)


def _pool(size: Size) -> int:
    return max(size.k, size.num_experts // 2)


def modality_pools(size: Size) -> Sections:
    """Isolated pools as in ERNIE 4.5, Baidu 2025.

    Half of the experts for each of two modalities, if half of them hold k, else one pool; balance 1e-2
    is ours. Tokens without a modality use the first pool.
    """
    half = size.num_experts // 2
    split = size.num_experts % 2 == 0 and half >= size.k
    return _preset(
        "modality_pools",
        {"k": size.k, "modalities": 2, "pools": (half, half) if split else ()},
        balance=1e-2,
    )


def limoe(size: Size) -> Sections:
    """LIMoE. Mustafa et al. 2022, arXiv:2206.02770.

    One pool, and an entropy loss for each modality, local and global. Published: one expert a token.
    Weights of 0.04 and the config's k are ours. Batch-prioritised seating is left out: it is noncausal.
    """
    router = {"k": size.k, "modalities": 2, "pools": (), "normalize": "none"}
    return _preset("modality_pools", router, modality_local=0.04, modality_global=0.04)


PRESETS: dict[str, Callable[[Size], Sections]] = {
    preset.__name__: preset
    for preset in (
        *(switch, gshard, noisy_topk, vmoe, topk, olmoe, mixtral, qwen3),
        *(deepseek_v2, deepseek_v3, quantile),
        *(top_p, dynmoe, remoe, relu, dselect_k),
        *(cosine, query_key, expert_attention, product_key, residual, recurrent),
        *(expert_choice, base, sinkhorn, hash, hash_balanced, bigram_hash),
        *(position, position_weighted),
        *(random, thor, smoe_dropout, gumbel, gumbel_sampled, reinforce, bernoulli),
        *(random_path, random_path_sampled, noisy_weights, prior),
        *(soft_moe, smear, lory),
        *(two_level, balanced_groups, segment, segment_self, document_pool, document_pool_whole),
        *(modality_pools, limoe),
    )
}
