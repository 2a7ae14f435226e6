"""What a router returns and what a sparse layer reports: NamedTuples, hence plain pytrees."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

Scalar = float | int | Float[Array, ""]  # a number that may be traced
State = dict[str, Array]  # a router's state in one layer: float32 or int32 arrays, no gradient


class Choices(NamedTuple):
    """Token choice: every token names up to `K` experts.

    Entries with `valid` False (padding, unused choices) have gate 0 and take no slot; their expert
    number is in range but means nothing.
    """

    expert: Int[Array, "B S K"]  # int32, in [0, E)
    gate: Float[Array, "B S K"]  # float32, carries the router's gradient
    valid: Bool[Array, "B S K"]


class Slots(NamedTuple):
    """Expert choice: every expert names tokens of each row, up to `C` of them.

    Entries with `valid` False are empty: gate 0, and a token number that is in range but means
    nothing.
    """

    token: Int[Array, "B E C"]  # int32, position in the row, in [0, S)
    gate: Float[Array, "B E C"]  # float32, carries the router's gradient
    valid: Bool[Array, "B E C"]


class Mixing(NamedTuple):
    """Soft slots: experts work on mixtures of tokens. `P` = E x slots, slot p is of expert p // slots."""

    dispatch: Float[Array, "B S P"]  # columns sum to 1: what each slot takes of each token
    combine: Float[Array, "B S P"]  # rows sum to 1: what each token takes of each slot


class Merging(NamedTuple):
    """Soft merging: one merged expert for each of `M` contiguous segments of ceil(S/M) positions."""

    weight: Float[Array, "B M E"]


Plan = Choices | Slots | Mixing | Merging

Terms = dict[str, Array]  # per-token values [B S ...] in a Routing, sums [B ...] in a report

# Terms under names that start like this stay per token, for losses that need each token's own
# cross-entropy: policy gradients.
PER_TOKEN = "token/"


class Routing(NamedTuple):
    """A router's decision, with what losses and metrics need to judge it."""

    logits: Float[Array, "B S E"]  # float32, before noise and bias
    probs: Float[Array, "B S E"]  # float32, rows sum to 1: softmax, or normalised sigmoid scores
    plan: Plan
    terms: Terms = {}  # noqa: RUF012 - never changed


class LayerReport(NamedTuple):
    """What one sparse layer tells about one batch: sums over the valid tokens of each row.

    Row sums, not means: they add up over microbatches, evaluation batches and devices without
    changing a statistic. Stacked over layers, every field gets a leading `L`. For soft plans the
    counts are weights, rounded to whole tokens a row.
    """

    row_tokens: Float[Array, " B"]  # valid tokens
    row_requested: Float[Array, "B E"]  # choices of each expert, before any drop
    row_kept: Float[Array, "B E"]  # choices that reached their expert
    row_ranked: Float[Array, "B E"]  # choices if the K largest probs decided: no bias, no groups
    row_first: Float[Array, "B E"]  # first choices, before any drop
    row_gates: Float[Array, "B E"]  # sum of gates; differentiable
    row_probs: Float[Array, "B E"]  # sum of probs; differentiable
    row_lse_squared: Float[Array, " B"]  # sum of logsumexp(logits)^2; differentiable
    row_entropy: Float[Array, " B"]  # sum of the entropy of probs, nats; differentiable
    row_confidence: Float[Array, " B"]  # sum of the largest prob
    row_margin: Float[Array, " B"]  # sum of prob of rank K minus prob of rank K+1
    logit_max: Float[Array, ""]  # largest |logit| of a valid token
    expert: Int[Array, "B S K"]  # who went where, -1 where no choice was kept or made
    row_terms: Terms = {}  # noqa: RUF012 - sums of a router's own terms, [B ...]; differentiable
    token_terms: Terms = {}  # noqa: RUF012 - the terms under PER_TOKEN, [B S ...]
