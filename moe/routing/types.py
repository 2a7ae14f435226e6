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


class Routing(NamedTuple):
    """A router's decision, with what losses and metrics need to judge it."""

    logits: Float[Array, "B S E"]  # float32, before noise and bias
    probs: Float[Array, "B S E"]  # float32, rows sum to 1: softmax, or normalised sigmoid scores
    plan: Choices


class LayerReport(NamedTuple):
    """What one sparse layer tells about one batch: sums over the valid tokens of each row.

    Row sums, not means: they add up over microbatches, evaluation batches and devices without
    changing a statistic. Stacked over layers, every field gets a leading `L`.
    """

    row_tokens: Float[Array, " B"]  # valid tokens
    row_requested: Float[Array, "B E"]  # choices of each expert, before any drop
    row_kept: Float[Array, "B E"]  # choices that reached their expert
    row_ranked: Float[Array, "B E"]  # choices if the K largest probs decided: no bias, no groups
    row_probs: Float[Array, "B E"]  # sum of probs; differentiable
    row_lse_squared: Float[Array, " B"]  # sum of logsumexp(logits)^2; differentiable
    row_entropy: Float[Array, " B"]  # sum of the entropy of probs, nats
    row_confidence: Float[Array, " B"]  # sum of the largest prob
    row_margin: Float[Array, " B"]  # sum of prob of rank K minus prob of rank K+1
    logit_max: Float[Array, ""]  # largest |logit| of a valid token
    expert: Int[Array, "B S K"]  # who went where, -1 where no choice was kept or made
