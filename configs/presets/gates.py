"""Other gates than one product, assignment of whole rows, and fixed tables."""

from moe.config import import_beside

common = import_beside(__file__, "common.py")


def cosine(size: common.Size) -> common.Sections:
    """X-MoE. Chi et al. 2022, arXiv:2204.09179.

    Published: E/2 dimensions, learned temperature from 0.3 with softmax gates; balance 1e-2.
    """
    return common.preset("cosine", {"k": size.k, "score": "softmax"}, balance=1e-2)


def query_key(size: common.Size) -> common.Sections:
    """Keys as in Lample et al. 2019, arXiv:1907.05242, compared with all experts; balance 1e-2 is ours."""
    return common.preset("query_key", {"k": size.k}, balance=1e-2)


def expert_attention(size: common.Size) -> common.Sections:
    """Yuan 2.0-M32. Wu et al. 2024, arXiv:2405.17976.

    Published: top-2 of 32, softmax of the chosen. Here k stays the config's; balance 1e-2 is ours.
    """
    router = {"k": size.k, "normalize": "topk_softmax"}
    return common.preset("expert_attention", router, balance=1e-2)


def product_key(size: common.Size) -> common.Sections:
    """PEER. He 2024, arXiv:2407.04153.

    Published: 8 heads with 16 experts each of 1024^2; no loss. Here k stays the config's, in as many heads of
    at least 2 experts as divide it, up to 8. E must be a square.
    """
    heads = common.divisor(size.k, min(8, max(1, size.k // 2)))
    return common.preset("product_key", {"k": size.k, "heads": heads})


def residual(size: common.Size) -> common.Sections:
    """MoE++. Jin et al. 2024, arXiv:2410.07348.

    Logits build on the layer below. Published: balance 1e-2. Its zero-computation experts are the model's.
    """
    return common.preset("residual", {"k": size.k}, balance=1e-2)


def recurrent(size: common.Size) -> common.Sections:
    """RMoE. Qiu et al. 2025, arXiv:2408.06793.

    A GRU over depth. The size of its state, 64, and balance 1e-2 are ours.
    """
    return common.preset("recurrent", {"k": size.k, "memory_width": 64}, balance=1e-2)


# Assignment, and fixed tables.


def expert_choice(size: common.Size) -> common.Sections:
    """Expert Choice. Zhou et al. 2022, arXiv:2202.09368.

    Published: 2 experts a token on average, no loss. Here the average is the config's k. C3.
    """
    return common.preset("expert_choice", {"k": size.k, "normalize": "experts"})


def base(size: common.Size) -> common.Sections:
    """BASE layers. Lewis et al. 2021, arXiv:2103.16716.

    Published: one expert, equal counts, no loss. C3.
    """
    return common.preset("base", {"k": 1})


def sinkhorn(size: common.Size) -> common.Sections:
    """S-BASE. Clark et al. 2022, arXiv:2202.01169.

    Published: one expert, no loss. C3.
    """
    return common.preset("sinkhorn", {"k": 1, "temperature": 1.0, "iterations": 30})


def hash(size: common.Size) -> common.Sections:
    """Hash layers. Roller et al. 2021, arXiv:2106.04426.

    A random table of token ids. Published: one expert; here k experts that share the gate.
    """
    return common.preset("hash", {"k": size.k, "kind": "random"})


def hash_balanced(size: common.Size) -> common.Sections:
    """Hash layers with the balanced table of arXiv:2106.04426: frequent ids first, emptiest expert."""
    return common.preset("hash", {"k": size.k, "kind": "balanced"})


def bigram_hash(size: common.Size) -> common.Sections:
    """Hash layers over bigrams, arXiv:2106.04426. The size of the shared table, 16384, is ours."""
    return common.preset("bigram_hash", {"k": size.k, "buckets": 16384})


def position(size: common.Size) -> common.Sections:
    """Position modulo E, a control of this project; no paper."""
    return common.preset("position", {"k": size.k, "kind": "strided"})


def position_weighted(size: common.Size) -> common.Sections:
    """Blocks of positions, each with a learned weight, a control of this project; no paper."""
    length = max(size.sequence_length, size.num_experts)
    return common.preset("position_weighted", {"k": size.k, "kind": "block", "length": length})


PRESETS = (
    *(cosine, query_key, expert_attention, product_key, residual, recurrent),
    *(expert_choice, base, sinkhorn, hash, hash_balanced, bigram_hash),
    *(position, position_weighted),
)
