"""Soft mixtures, two levels, segments, documents and modalities."""

import math

from moe.config import import_beside

common = import_beside(__file__, "common.py")


def soft_moe(size: common.Size) -> common.Sections:
    """Soft MoE. Puigcerver et al. 2024, arXiv:2308.00951.

    Published: no loss; slots in proportion to tokens. Here S k / E slots an expert, the compute of k
    experts a token. C3.
    """
    slots = max(1, size.sequence_length * size.k // size.num_experts)
    return common.preset("soft_moe", {"k": size.k, "slots": slots})


def smear(size: common.Size) -> common.Sections:
    """SMEAR. Muqeeth et al. 2023, arXiv:2306.03745.

    One merged expert a row. Published: expert dropout 0.1, no loss. C3.
    """
    return common.preset("smear", {"k": 1, "dropout": 0.1})


def lory(size: common.Size) -> common.Sections:
    """Lory. Zhong et al. 2024, arXiv:2405.03133.

    One merged expert a segment. Published: segments of 256 tokens, no loss. Here at most a quarter of
    the row, so that most segments have one before them.
    """
    segment = common.divisor(size.sequence_length, max(1, min(256, size.sequence_length // 4)))
    return common.preset("lory", {"k": 1, "segment": segment})


# Two levels, segments, documents, modalities.


def two_level(size: common.Size) -> common.Sections:
    """SMILE. He et al. 2022, arXiv:2212.05191; hierarchies of experts are Jordan and Jacobs 1994.

    Groups first, experts inside them second. Published: one expert in one group. Here the best k / 2
    experts of each of 2 groups, if k is even and groups hold them, else k in one group; both levels'
    balance 1e-2 is ours.
    """
    groups = common.divisor(size.num_experts, 4)
    kept = 2 if groups >= 2 and size.k % 2 == 0 and size.k > 2 else 1
    while size.k // kept > size.num_experts // groups:
        groups = common.divisor(size.num_experts, groups - 1)
    kept = min(kept, groups)
    norm = "joint" if kept > 1 else "none"
    router = {"k": size.k, "groups": groups, "groups_kept": kept, "variant": "hard", "norm": norm}
    return common.preset("two_level", router, group_balance=1e-2, within_group_balance=1e-2)


def balanced_groups(size: common.Size) -> common.Sections:
    """MoGE, in Pangu Pro MoE. Tang et al. 2025, arXiv:2505.21411.

    Published: 8 of 64 experts, one in each of 8 groups. Here groups are the largest number up to 8 that
    divides both E and k; balance inside groups 1e-2 is ours.
    """
    groups = common.divisor(math.gcd(size.num_experts, size.k), 8)
    return common.preset(
        "balanced_groups", {"k": size.k, "groups": groups}, within_group_balance=1e-2
    )


def segment(size: common.Size) -> common.Sections:
    """Segment routing by the segment before. Kin to Lory, arXiv:2405.03133, and Seg-MoE, arXiv:2601.21641.

    Segments of a sixteenth of the row and balance 1e-2 are ours.
    """
    length = max(1, size.sequence_length // 16)
    router = {"k": size.k, "segment_size": length, "mode": "shift", "pool": "mean"}
    return common.preset("segment", router, balance=1e-2)


def segment_self(size: common.Size) -> common.Sections:
    """Segment routing by the segment itself, as Seg-MoE, arXiv:2601.21641. Numbers as `segment`. C3."""
    length = max(1, size.sequence_length // 16)
    router = {"k": size.k, "segment_size": length, "pool": "mean"}
    return common.preset("segment_self", router, balance=1e-2)


def document_pool(size: common.Size) -> common.Sections:
    """EMO made causal. Allen Institute for AI 2026, repository allenai/EMO.

    A document has a pool of E/2 experts, or k; that and balance 1e-2 are ours.
    """
    length = max(1, size.sequence_length // 16)
    router = {"k": size.k, "pool_size": _pool(size), "segment_size": length}
    return common.preset("document_pool", router, balance=1e-2)


def document_pool_whole(size: common.Size) -> common.Sections:
    """EMO, repository allenai/EMO: a pool made of the whole document. Numbers as `document_pool`. C3."""
    return common.preset(
        "document_pool_whole", {"k": size.k, "pool_size": _pool(size)}, balance=1e-2
    )


def _pool(size: common.Size) -> int:
    return max(size.k, size.num_experts // 2)


def modality_pools(size: common.Size) -> common.Sections:
    """Isolated pools as in ERNIE 4.5, Baidu 2025.

    Half of the experts for each of two modalities, if half of them hold k, else one pool; balance 1e-2
    is ours. Tokens without a modality use the first pool.
    """
    half = size.num_experts // 2
    split = size.num_experts % 2 == 0 and half >= size.k
    return common.preset(
        "modality_pools",
        {"k": size.k, "modalities": 2, "pools": (half, half) if split else ()},
        balance=1e-2,
    )


def limoe(size: common.Size) -> common.Sections:
    """LIMoE. Mustafa et al. 2022, arXiv:2206.02770.

    One pool, and an entropy loss for each modality, local and global. Published: one expert a token.
    Weights of 0.04 and the config's k are ours. Batch-prioritised seating is left out: it is noncausal.
    """
    router = {"k": size.k, "modalities": 2, "pools": (), "normalize": "none"}
    return common.preset("modality_pools", router, modality_local=0.04, modality_global=0.04)


PRESETS = (
    *(soft_moe, smear, lory),
    *(two_level, balanced_groups, segment, segment_self, document_pool, document_pool_whole),
    *(modality_pools, limoe),
)
