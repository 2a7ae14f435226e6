"""Where tokens go and why: sums that add over batches, and the measures made of them.

Choices are `[L B S K]` expert numbers, -1 where there is none (`LayerReport.expert`, stacked). What
ends in `_counts` is a sum over tokens: add those of any number of batches, then divide once. All in
NumPy, counts in int64 and quotients in float64; nothing is ever NaN.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Shaped
import numpy as np

Counts = Shaped[np.ndarray, "..."]


class Overlap(NamedTuple):
    """How much of a reference's choices other choices share, in sums over tokens, layer by layer."""

    shared: Shaped[np.ndarray, " L"]  # choices that both made
    reference: Shaped[np.ndarray, " L"]  # choices of the reference
    changed: Shaped[np.ndarray, " L"]  # tokens whose set of experts differs
    tokens: Shaped[np.ndarray, " L"]  # tokens with a choice in one or both


def add(a: Overlap, b: Overlap) -> Overlap:
    """The sums of two batches."""
    return Overlap(*(x + y for x, y in zip(a, b, strict=True)))


def multi_hot(choices: Int[np.ndarray, "*A K"], num_experts: int) -> Bool[np.ndarray, "*A E"]:
    """Which experts each token visits; the order of its choices, and -1, leave no trace."""
    hot = np.zeros((*choices.shape[:-1], num_experts + 1), bool)
    np.put_along_axis(hot, np.where(choices < 0, num_experts, choices), True, axis=-1)
    return hot[..., :num_experts]


def overlap_counts(
    choices: Int[np.ndarray, "L B S K"], reference: Int[np.ndarray, "L B S J"], num_experts: int
) -> Overlap:
    """Compares the choices that two checkpoints, or two forms of a router, made for the same tokens."""
    one, two = multi_hot(choices, num_experts), multi_hot(reference, num_experts)
    return Overlap(
        (one & two).sum(axis=(1, 2, 3)),
        two.sum(axis=(1, 2, 3)),
        (one != two).any(axis=-1).sum(axis=(1, 2)),
        (one | two).any(axis=-1).sum(axis=(1, 2)),
    )


def saturation(sums: Overlap) -> Float[np.ndarray, " L"]:
    """M11: share of the reference's choices that are made already.

    With the last checkpoint as reference this is the router saturation of OLMoE (Muennighoff et al.
    2024, arXiv:2409.02060, section 5.1), `mean_t |S_t n S_t'| / k`; K of E experts drawn at random
    give K/E. One less it against the checkpoint before is the churn.
    """
    return _divide(sums.shared, sums.reference)


def flip_rate(sums: Overlap) -> Float[np.ndarray, " L"]:
    """M17: share of tokens whose set of experts differs at all.

    Between the training form and the causal form of a router it belongs to the causal gap; between
    the same rows in two different batches it is the sensitivity to the batch's composition.
    """
    return _divide(sums.changed, sums.tokens)


def causal_gap(causal_nll: float, training_nll: float, tokens: float) -> float:
    """M17: nats a token that the causal form of routing costs beyond the form of training.

    Large and positive: the training form reads what it will not have. Both sums are over the same
    `tokens`.
    """
    return (causal_nll - training_nll) / max(tokens, 1.0)


def coactivation_counts(
    choices: Int[np.ndarray, "L B S K"], num_experts: int
) -> Int[np.ndarray, "L E E"]:
    """Tokens that visit both experts; on the diagonal, those that visit one."""
    hot = multi_hot(choices, num_experts).reshape(len(choices), -1, num_experts).astype(np.float64)
    return np.rint(hot.swapaxes(1, 2) @ hot).astype(np.int64)


def coactivation(counts: Shaped[np.ndarray, "L E E"]) -> Float[np.ndarray, "L E E"]:
    """M12: `C_ij / N_i`, the share of expert i's tokens that visit j too.

    Over all pairs of a token's choices, not the consecutive ones alone. Rows of an expert without a
    token are 0, other diagonals 1; not symmetric.
    """
    return _divide(counts, np.diagonal(counts, axis1=1, axis2=2)[..., None])


def strongest_partner(counts: Shaped[np.ndarray, "L E E"]) -> Float[np.ndarray, " L"]:
    """Mean over experts of their largest co-activation with another; near 1: they come in pairs."""
    share = coactivation(counts)
    share[:, np.arange(share.shape[1]), np.arange(share.shape[1])] = 0.0
    return share.max(axis=-1).mean(axis=-1)


def specialisation(
    counts: Shaped[np.ndarray, "L M E"], tokens: Shaped[np.ndarray, " M"]
) -> Float[np.ndarray, "L M E"]:
    """M13, M15: share of a kind's tokens that visit each expert; rows sum to the mean k.

    Args:
        counts: choices by layer, kind of token (text domain, bin of positions) and expert.
        tokens: of each kind.
    """
    return _divide(counts, np.asarray(tokens)[None, :, None])


def mutual_information(counts: Shaped[np.ndarray, "L M E"]) -> Float[np.ndarray, " L"]:
    """M13: I(kind; expert) in nats over choices, from 0 (kinds share their experts) to the kinds' entropy."""
    joint = _divide(counts, counts.sum(axis=(-2, -1), keepdims=True))
    apart = entropy(joint.sum(axis=-1)) + entropy(joint.sum(axis=-2))
    return np.maximum(apart - _plogp(joint).sum(axis=(-2, -1)), 0.0)


def information_share(counts: Shaped[np.ndarray, "L M E"]) -> Float[np.ndarray, " L"]:
    """I(kind; expert) / H(kind), from 0 to 1: how much of the kind one choice gives away."""
    kinds = counts.sum(axis=-1)
    return _divide(
        mutual_information(counts), entropy(_divide(kinds, kinds.sum(-1, keepdims=True)))
    )


def shuffled(
    kind: Int[np.ndarray, " N"], mask: Bool[np.ndarray, " N"], draws: Float[np.ndarray, " N"]
) -> Int[np.ndarray, " N"]:
    """The kinds of what the mask holds, permuted among themselves.

    Counts of shuffled kinds give the information that chance alone makes of so few tokens: it is
    above 0, about `(M - 1)(E - 1) / 2n` nats for n independent choices (Miller 1955).

    Args:
        kind: of each row or token.
        mask: those that take part; others keep theirs.
        draws: uniform; their order is the permutation.
    """
    held = np.flatnonzero(mask)
    mixed = kind.copy()
    mixed[held] = kind[held[np.argsort(draws[held], kind="stable")]]
    return mixed


class Favourites(NamedTuple):
    """The ids that each expert takes most beyond its share; -1 where it has fewer."""

    ids: Int[np.ndarray, "L E top"]
    counts: Int[np.ndarray, "L E top"]  # choices of the expert by tokens of the id
    lift: Float[np.ndarray, "L E top"]  # P(expert | id) / P(expert), both over choices


def favourites(counts: Shaped[np.ndarray, "L V E"], *, least: int = 10, top: int = 8) -> Favourites:
    """Ids by lift, the more frequent first among equals.

    Args:
        counts: from `visit_counts` with token ids as the kind.
        least: choices; an id that made fewer in a layer, or that comes no more often
            than others do, is not listed.
        top: ids for each expert.
    """
    of_id, of_expert = counts.sum(axis=2, keepdims=True), counts.sum(axis=1, keepdims=True)
    share = _divide(of_expert, of_expert.sum(axis=2, keepdims=True))
    lift = _divide(_divide(counts, of_id), share)  # [L V E]
    lift = np.where((of_id >= least) & (lift > 1.0), lift, 0.0)
    order = np.lexsort((-counts, -lift), axis=1)[:, :top]
    best = np.take_along_axis(lift, order, axis=1)
    listed = best > 0
    found = np.take_along_axis(counts, order, axis=1).astype(np.int64)
    rows = (np.where(listed, order, -1), np.where(listed, found, 0), best)
    return Favourites(*(np.moveaxis(row, 1, 2) for row in rows))


def divergence(counts: Shaped[np.ndarray, "L M E"]) -> Float[np.ndarray, "L M M"]:
    """M13: Jensen-Shannon divergence between the loads of every two kinds, nats, 0 to ln 2.

    0 for a kind without a choice.
    """
    q = _divide(counts, counts.sum(axis=-1, keepdims=True))
    one, two = q[:, :, None], q[:, None, :]
    mixed = entropy((one + two) / 2) - (entropy(one) + entropy(two)) / 2
    seen = counts.sum(axis=-1) > 0
    return np.where(seen[:, :, None] & seen[:, None, :], np.maximum(mixed, 0.0), 0.0)


def mean_divergence(counts: Shaped[np.ndarray, "L M E"]) -> Float[np.ndarray, " L"]:
    """Mean of `divergence` over the pairs of kinds that have choices; 0 with fewer than two."""
    seen = counts.sum(axis=-1) > 0
    pairs = np.triu(seen[:, :, None] & seen[:, None, :], k=1)
    return _divide((divergence(counts) * pairs).sum(axis=(1, 2)), pairs.sum(axis=(1, 2)))


def position_bins(positions: Int[np.ndarray, "B S"], bins: int) -> Int[np.ndarray, "B S"]:
    """M15: `floor(bins t / S)`, for `visit_counts`; the last takes what is beyond."""
    return np.minimum(positions * bins // positions.shape[1], bins - 1)


def visit_counts(
    choices: Int[np.ndarray, "L B S K"], kind: Int[np.ndarray, "B S"], kinds: int, num_experts: int
) -> Int[np.ndarray, "L M E"]:
    """Choices by layer, kind of token and expert.

    Args:
        choices: -1 for none.
        kind: of each token, in [0, kinds): its domain, bin of position, input id or predicted id.
        kinds: `M`.
        num_experts: `E`.
    """
    chosen = choices >= 0
    cell = kind[None, :, :, None] * num_experts + np.maximum(choices, 0)  # [L B S K]
    size = kinds * num_experts
    rows = [np.bincount(c[v], minlength=size) for c, v in zip(cell, chosen, strict=True)]
    return np.stack(rows).reshape(len(choices), kinds, num_experts)


def vocabulary_specialisation(
    counts: Shaped[np.ndarray, "L V E"],
    tokens: Shaped[np.ndarray, " V"],
    *,
    least: int = 10,
    top: int = 10,
) -> Float[np.ndarray, " L"]:
    """M14: mean over experts of how surely their favourite ids come to them.

    `VS(e, v) = N_{v,e} / N_v`, averaged over each expert's `top` ids of the largest share among
    those that occur at least `least` times. 1 where every id has experts of its own; where ids mean
    nothing it is above K/E by as much as the luckiest of few tokens.

    Args:
        counts: from `visit_counts` with input ids or predicted ids as the kind.
        tokens: `N_v`, how often each of these ids occurs.
        least: ids that are rarer do not count.
        top: ids for each expert.

    Returns:
        `[L]`; 0 where no id is frequent enough.
    """
    frequent = np.asarray(tokens) >= least
    if not frequent.any():
        return np.zeros(len(counts))
    share = _divide(counts[:, frequent], np.asarray(tokens)[frequent][None, :, None])  # [L v E]
    best = -np.sort(-share, axis=1)[:, :top]
    return best.mean(axis=(1, 2))


def entropy(shares: Float[np.ndarray, "*A E"]) -> Float[np.ndarray, "*A"]:
    """Entropy in nats of shares that sum to 1 along the last axis."""
    return np.asarray(_plogp(shares).sum(axis=-1))


def _plogp(p: Float[np.ndarray, "*A"]) -> Float[np.ndarray, "*A"]:
    return -p * np.log(np.where(p > 0, p, 1.0))


def _divide(a: Counts, b: Counts) -> Float[np.ndarray, "..."]:
    """Quotients, 0 where the denominator is."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), 0.0)
