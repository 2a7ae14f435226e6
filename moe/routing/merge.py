"""Routing by merging: one expert made of all experts' weights, for a row or for each segment of it.

SMEAR, Muqeeth et al. 2023 (arXiv:2306.03745), merges once for a sequence, from the mean of its tokens:
C3. Lory, Zhong et al. 2024 (arXiv:2405.03133), merges for each segment, from the mean of the segment
before: C1. The paper routes the first segment by its own mean behind a stop-gradient, which hides the
leak from training and not from the loss; here a learned constant routes it.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moe.errors import ConfigError
from moe.routing.gates import Gated, LinearGate, project
from moe.routing.router import Router
from moe.routing.types import Merging, Routing


class MeanGate(nnx.Module):
    """`logits = LayerNorm(mean of the valid tokens of the row) @ kernel`, the same at each position.

    Args:
        width: model width `D`.
        num_experts: `E`.
        rngs: its `params` stream draws the kernel from normal(0, D^-1/2).

    Attributes:
        kernel: float32 `[D E]`.
        scale: float32 `[D]`, of the LayerNorm; its bias would only add a constant logit.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(width**-0.5)
        kernel = init(rngs.params(), (width, num_experts), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("D", "E"))
        self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes=("D",))

    def __call__(self, tokens: Float[Array, "B S D"], *, valid: Bool[Array, "B S"]) -> Gated:
        """Scores every expert for the row as a whole."""
        mean = segment_means(tokens.astype(jnp.float32), valid, tokens.shape[1])  # [B 1 D]
        normal = jax.nn.standardize(mean, axis=-1, epsilon=1e-6) * self.scale[...][None, None]
        logits = project(normal, self.kernel[...])
        return Gated(jnp.broadcast_to(logits, (*valid.shape, logits.shape[-1])))


class LoryGate(nnx.Module):
    """A linear gate, and the logits of the first segment, which nothing comes before.

    Attributes:
        linear: the gate of single tokens; the mean of its logits is the logit of the mean.
        first: float32 `[E]`, zeros at the start: a plain mean of the experts.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs):
        self.linear = LinearGate(width, num_experts, rngs=rngs)
        self.first = nnx.Param(jnp.zeros(num_experts, jnp.float32), axes=("E",))

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Returns a logit for every token and expert, and `first`."""
        return Gated(self.linear(tokens).logits, {"first": self.first[...]})


def segment_means(
    x: Float[Array, "B S X"], valid: Bool[Array, "B S"], segment: int
) -> Float[Array, "B M X"]:
    """Means over the valid positions of each `segment` positions; 0 where there are none."""
    B, S, X = x.shape
    M = -(-S // segment)
    padding = ((0, 0), (0, M * segment - S))
    real = jnp.pad(valid, padding).reshape(B, M, segment, 1)
    parts = jnp.pad(x, (*padding, (0, 0))).reshape(B, M, segment, X)
    total = jnp.where(real, parts, 0.0).sum(axis=2)
    return total / jnp.maximum(real.sum(axis=2, dtype=x.dtype), 1.0)


def smear(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    training: bool = True,
    key: PRNGKeyArray | None = None,
    dropout: float = 0.1,
) -> Routing:
    """Merges one expert for the whole row, by the softmax of its mean logits.

    Args:
        logits: float32 `[B S E]`; those of `MeanGate` are the same at each position.
        valid: `[B S]`, True for a real token.
        k: not used: one merged expert runs, whatever the number of experts.
        training: whether experts drop out.
        key: for the dropout.
        dropout: chance of each expert to be left out of a row's mean, whose weights then sum to 1
            without it; a row that would lose all experts keeps them.

    Returns:
        The decision; `logits` and `probs` are those of the row, before dropout, at every position.

    Raises:
        ValueError: dropout in training without a key.
    """
    del k
    row = segment_means(logits, valid, logits.shape[1])  # [B 1 E]
    kept = row
    if training and dropout > 0.0:
        if key is None:
            raise ValueError("expert dropout draws in training: pass a key")
        alive = jax.random.bernoulli(key, 1.0 - dropout, row.shape)
        alive = alive | ~alive.any(axis=-1, keepdims=True)
        kept = jnp.where(alive, row, -jnp.inf)
    everywhere = jnp.broadcast_to(row, logits.shape)
    plan = Merging(jax.nn.softmax(kept))
    return Routing(everywhere, jax.nn.softmax(everywhere), plan)


def lory(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    first: Float[Array, " E"],
    *,
    k: int,
    segment: int = 64,
) -> Routing:
    """Merges one expert for each segment, by the softmax of the mean logits of the segment before.

    Args:
        logits: float32 `[B S E]`, of single tokens.
        valid: `[B S]`, True for a real token. A segment after one without any gets a plain mean.
        first: float32 `[E]`, logits of the first segment.
        k: not used: one merged expert runs, whatever the number of experts.
        segment: positions of a segment (the paper's 256).

    Returns:
        The decision; `logits` and `probs` are those of the segment at each of its positions.
    """
    del k
    B, S, E = logits.shape
    means = segment_means(logits, valid, segment)
    start = jnp.broadcast_to(first, (B, 1, E))
    shifted = jnp.concatenate([start, means[:, :-1]], axis=1)  # [B M E]
    everywhere = jnp.repeat(shifted, segment, axis=1)[:, :S]
    probs = jax.nn.softmax(everywhere)
    return Routing(everywhere, probs, Merging(probs[:, :: plan_segment(S, segment)]))


def plan_segment(length: int, segment: int) -> int:
    """Returns the longest segment that a plan of `length` positions can say without moving a border.

    A plan tells the number of segments and not their length, which is `ceil(S / M)`. That is
    `segment` wherever it divides the length, as in training; for any other length, as in generation,
    it takes a divisor of `segment`, several of which then share their weights.
    """
    divisors = (s for s in range(min(segment, length), 0, -1) if segment % s == 0 or s == length)
    return next(s for s in divisors if -(-length // -(-length // s)) == s)


def check_smear(num_experts: int, *, k: int, dropout: float = 0.1) -> None:
    """Refuses a dropout that is no chance.

    Raises:
        ConfigError: `dropout` outside [0, 1).
    """
    del num_experts, k
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(
            f"router.dropout={dropout} must be at least 0 and below 1: the chance of each expert to "
            "be left out of the merge. The SMEAR paper uses 0.1."
        )


def check_lory(
    num_experts: int, *, k: int, sequence_length: int | None = None, segment: int = 64
) -> None:
    """Refuses segments that do not divide the row.

    Raises:
        ConfigError: no segment, or one that does not divide `data.sequence_length`.
    """
    del num_experts, k
    if segment < 1 or (sequence_length is not None and sequence_length % segment):
        length = "" if sequence_length is None else f"={sequence_length}"
        raise ConfigError(
            f"router.segment={segment} must be at least 1 and divide data.sequence_length{length}, so "
            "that all segments are equal. Choose a divisor."
        )


SMEAR = Router(
    smear,
    paper="Muqeeth et al. 2023, arXiv:2306.03745",
    equation="g = softmax(W LN(mean_t x)); y = f(x; sum_e g_e theta_e)",
    cost="1 expert, and E experts' weights added up for each row",
    use="Tasks that see the whole row; every expert gets a gradient from every row.",
    check=check_smear,
    gate=MeanGate,
    plan="merging",
    causality="C3",
    causal_in_eval=False,
    fixed_k=False,
)

LORY = Router(
    lory,
    paper="Zhong et al. 2024, arXiv:2405.03133",
    equation="g_j = softmax(W mean(x in segment j-1)), g_1 learned; y = f(x; sum_e g_je theta_e)",
    cost="1 expert, and E experts' weights added up for each segment",
    use="Language models with experts that specialise by topic; differentiable throughout.",
    check=check_lory,
    gate=LoryGate,
    plan="merging",
    causality="C1",
    fixed_k=False,
)
