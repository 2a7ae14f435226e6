"""Position routing: where a token stands decides, and nothing it says.

The literal reading of "expert i gets part i of the input", and a control that knows no content: a
learned router must beat it to claim that content matters.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from moe.errors import ConfigError
from moe.routing.gates import Gated
from moe.routing.router import Router
from moe.routing.selection import choices, gather
from moe.routing.types import Routing

KINDS = ("strided", "block")


class WeightGate(nnx.Module):
    """One learned weight for each expert, the same for every token.

    Attributes:
        weight: float32 `[E]`; an expert weighs `softplus` of it, which is 1 at the start.
    """

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs):
        del width, rngs
        start = jnp.full(num_experts, np.log(np.e - 1.0), jnp.float32)
        self.weight = nnx.Param(start, axes=("E",))

    def __call__(self, tokens: Float[Array, "B S D"]) -> Gated:
        """Returns the parameter at every position."""
        weight = self.weight[...]
        return Gated(jnp.broadcast_to(weight, (*tokens.shape[:2], weight.shape[0])))


def experts_at(
    positions: Int[Array, "B S"], num_experts: int, k: int, kind: str, length: int
) -> Int[Array, "B S K"]:
    """Returns the expert of each position, and the `k - 1` that follow it in their circle."""
    if kind == "block":
        first = jnp.clip(positions * num_experts // length, 0, num_experts - 1)
    else:
        first = positions % num_experts
    return (first[..., None] + jnp.arange(k)[None, None]) % num_experts


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    positions: Int[Array, "B S"],
    kind: str = "strided",
    length: int = 0,
) -> Routing:
    """Sends the token at position t to `k` neighbouring experts, with gate 1/k each.

    Args:
        logits: only the shape `[B S E]` is read; a layer without a gate passes zeros.
        valid: `[B S]`, True for a real token.
        k: experts a token.
        positions: `[B S]`, place in the document, from 0.
        kind: `strided`, first expert `t mod E`; or `block`, first expert `floor(t E / length)`: each
            expert has one part of the text.
        length: positions of a whole text, for `block`. A number of the config, not the length of
            the row at hand, which would tell how much is still to come. Later positions go to the
            last expert.

    Returns:
        The decision; `logits` are zeros, `probs` is 1/k on the chosen experts.
    """
    expert = experts_at(positions, logits.shape[-1], k, kind, length)
    gate = jnp.full(expert.shape, 1.0 / k)
    return Routing(jnp.zeros_like(logits), _even(logits, expert), choices(expert, gate, valid))


def route_weighted(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    positions: Int[Array, "B S"],
    kind: str = "strided",
    length: int = 0,
) -> Routing:
    """As `route`, with gates `softplus(logit) / k`: one learned weight for each expert.

    Args:
        logits: float32 `[B S E]`, of `WeightGate`.
        valid: as in `route`.
        k: as in `route`.
        positions: as in `route`.
        kind: as in `route`.
        length: as in `route`.

    Returns:
        The decision; `probs` is 1/k on the chosen experts and learns nothing.
    """
    expert = experts_at(positions, logits.shape[-1], k, kind, length)
    gate = jax.nn.softplus(gather(logits, expert)) / k
    return Routing(logits, _even(logits, expert), choices(expert, gate, valid))


def _even(logits: Float[Array, "B S E"], expert: Int[Array, "B S K"]) -> Float[Array, "B S E"]:
    return jax.nn.one_hot(expert, logits.shape[-1]).sum(axis=-2) / expert.shape[-1]


def check(
    num_experts: int,
    *,
    k: int,
    sequence_length: int | None = None,
    kind: str = "strided",
    length: int = 0,
) -> None:
    """Refuses unknown kinds, and blocks of a text whose length is not given.

    Raises:
        ConfigError: `kind` is unknown, or `length` does not fit it.
    """
    del k
    if kind not in KINDS:
        raise ConfigError(f"router.kind={kind!r} is not one of {', '.join(KINDS)}; choose one.")
    least = max(num_experts, sequence_length or 0)
    if kind == "block" and length < least:
        raise ConfigError(
            f"router.length={length} with router.kind='block' must be at least {least}: positions "
            f"up to it are cut in model.num_experts={num_experts} parts, and those beyond it, up to "
            "data.sequence_length, would all go to the last expert. Set router.length to "
            "data.sequence_length."
        )


ROUTER = Router(
    route,
    paper="no paper: the literal reading of one expert for each part of the input",
    equation="e = t mod E, or floor(t E / n); gate = 1/k",
    cost="k experts",
    use="The control that knows where a token stands and not what it is.",
    check=check,
    gate=None,
)

WEIGHTED = Router(
    route_weighted,
    paper="no paper: y = sum_i w_i f_i over the parts of the input",
    equation="e = t mod E, or floor(t E / n); gate = softplus(w_e) / k",
    cost="k experts",
    use="Position routing whose experts may weigh more or less than the residual.",
    check=check,
    gate=WeightGate,
    permutes_experts=False,
)
