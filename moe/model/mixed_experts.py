"""Experts of other kinds beside the stacked feed-forward ones, behind the same router.

Jin et al. 2024, MoE++ (arXiv:2410.07348), and causal convolutions. Expert numbers, in this order:

| kind | of `x` | parameters |
|---|---|---|
| feed-forward | by `moe.model.experts`, through dispatch | stacked, `[0, first)` |
| conv | pointwise(depthwise causal convolution of `x`): linear, width 1 is a linear expert | `w D + D^2` |
| zero | nothing, and its gate goes to the token's other experts | none |
| copy | `x` | none |
| constant | `a_1 x + a_2 v`, `(a_1, a_2) = softmax(x W_c)` | `3 D` |

These experts cost next to nothing or need a token's neighbours, which dispatch takes apart. So they
run on all tokens where the tokens are, and the gates pick.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.model.experts import fan_in_init, project
from moe.routing.types import Choices, Scalar


class Kinds(NamedTuple):
    """How many experts of each kind follow the feed-forward ones."""

    conv: int = 0
    zero: int = 0
    copy: int = 0
    constant: int = 0

    def numbers(self, first: int) -> dict[str, range]:
        """The expert numbers of each kind, after `first` feed-forward experts."""
        found = {}
        for kind, count in zip(self._fields, self, strict=True):
            found[kind] = range(first, first + count)
            first += count
        return found

    def balance_weights(self, first: int, tau: Scalar) -> Float[Array, " E"]:
        """`eta` of the heterogeneous balance loss: `tau` for experts that compute next to nothing, else 1.

        At its minimum an expert's share is inverse to its weight, so the share of the `first + conv`
        experts that compute is `tau N / (tau N + N_free)`: the smaller `tau`, the cheaper a token.
        """
        computing = first + self.conv
        weights = [jnp.ones(computing), jnp.full(sum(self) - self.conv, tau, jnp.float32)]
        return jnp.concatenate(weights)


def split_choices(choices: Choices, num_ffn: int) -> Choices:
    """What dispatch may see: choices of an expert numbered `num_ffn` or above are not valid."""
    special = choices.expert >= num_ffn
    return Choices(
        jnp.where(special, 0, choices.expert),
        jnp.where(special, 0.0, choices.gate),
        choices.valid & ~special,
    )


def share_zero_gates(choices: Choices, zero: range) -> Choices:
    """Gives the gates of zero experts to the token's other experts, in proportion.

    A token's gates keep their sum, so gates that sum to 1 are renormalised over the rest, as in
    MoE++; a single gate that stands for the router's confidence, or one that is scaled, stays what
    it was. A token with zero experts only keeps gate 0 throughout: its output is 0.

    Args:
      choices: of all kinds of expert.
      zero: the numbers of the zero experts.
    """
    is_zero = (choices.expert >= zero.start) & (choices.expert < zero.stop)
    rest = jnp.where(is_zero, 0.0, choices.gate)
    total, left = (gate.sum(axis=-1, keepdims=True) for gate in (choices.gate, rest))
    # Both branches finite, or the gradient of the one that is not taken would be NaN.
    scale = jnp.where(left > 0, total / jnp.where(left > 0, left, 1.0), 1.0)
    touched = is_zero.any(axis=-1, keepdims=True)
    return choices._replace(gate=rest * jnp.where(touched, scale, 1.0))


class MixedExperts(nnx.Module):
    """The special experts of one layer. `Kinds` says how many; a kind with none has no parameter."""

    def __init__(
        self, kinds: Kinds, width: int, *, kernel: int = 3, out_scale: float = 1.0, rngs: nnx.Rngs
    ):
        """`kernel` is `w`, the positions that a convolution sees; `out_scale` as for `Experts`."""
        self.kinds, self.kernel = kinds, kernel
        if kinds.conv:
            self.depthwise = nnx.Param(
                fan_in_init(kernel)(rngs.params(), (kinds.conv, kernel, width)),
                axes=(None, None, "D"),
            )
            self.pointwise = nnx.Param(
                fan_in_init(width, out_scale)(rngs.params(), (kinds.conv, width, width)),
                axes=(None, "D", None),
            )
        if kinds.constant:
            self.constant_gate = nnx.Param(
                fan_in_init(width)(rngs.params(), (width, kinds.constant, 2)),
                axes=("D", None, None),
            )
            self.constant = nnx.Param(
                nnx.initializers.normal(0.02)(rngs.params(), (kinds.constant, width)),
                axes=(None, "D"),
            )

    @property
    def looks_back(self) -> bool:
        """Whether generation needs earlier inputs: `continued` instead of a call."""
        return self.kinds.conv > 0 and self.kernel > 1

    def __call__(
        self,
        x: Float[Array, "B S D"],
        choices: Choices,
        documents: Int[Array, "B S"] | None,
        valid: Bool[Array, "B S"],
        first: int,
    ) -> Float[Array, "B S D"]:
        """Sum of gate times output over the special experts that each token chose.

        Args:
          x: the layer's input.
          choices: of all kinds; after `share_zero_gates`.
          documents: of each position; a convolution sees one document only. None: one a row.
          valid: real tokens; a convolution does not see the others.
          first: number of feed-forward experts.
        """
        documents = jnp.ones(valid.shape, jnp.int32) if documents is None else documents
        past = ((0, 0), (self.kernel - 1, 0))
        return self._sum(
            x,
            choices,
            jnp.pad(x, (*past, (0, 0))),
            jnp.pad(jnp.where(valid, documents, 0), past),
            first,
        )

    def continued(
        self,
        x: Float[Array, "B S D"],
        choices: Choices,
        history: Float[Array, "B N D"],
        start: Int[Array, ""],
        first: int,
    ) -> Float[Array, "B S D"]:
        """As a call, for positions `start, start + 1, ...` of one document a row.

        Args:
          x: the layer's input at these positions.
          choices: at these positions.
          history: the layer's inputs since position 0, these positions included, of which only the
            last `S + w - 1` are read; what stands after them means nothing.
          start: position of the first of these.
          first: number of feed-forward experts.
        """
        past, length = self.kernel - 1, self.kernel - 1 + x.shape[1]
        window = jnp.pad(history, ((0, 0), (past, 0), (0, 0)))
        window = jax.lax.dynamic_slice_in_dim(window, start, length, axis=1)
        filled = jnp.arange(length) + start >= past
        documents = jnp.broadcast_to(filled.astype(jnp.int32), (x.shape[0], length))
        return self._sum(x, choices, window.astype(x.dtype), documents, first)

    def _sum(
        self, x: Array, choices: Choices, window: Array, documents: Array, first: int
    ) -> Float[Array, "B S D"]:
        numbers = self.kinds.numbers(first)
        y = x.astype(jnp.float32) * gates_of(choices, numbers["copy"]).sum(-1, keepdims=True)
        if self.kinds.constant:
            y += self._constants(x, gates_of(choices, numbers["constant"]))
        if self.kinds.conv:
            y += self._convolutions(x, window, documents, gates_of(choices, numbers["conv"]))
        return y.astype(x.dtype)

    def _constants(
        self, x: Float[Array, "B S D"], gate: Float[Array, "B S N"]
    ) -> Float[Array, "B S D"]:
        shares = jax.nn.softmax(project(x, self.constant_gate[...]).astype(jnp.float32))
        scale = jnp.sum(gate * shares[..., 0], axis=-1, keepdims=True)
        vectors = jnp.einsum("bsn,nd->bsd", gate * shares[..., 1], self.constant[...])
        return scale * x.astype(jnp.float32) + vectors

    def _convolutions(
        self,
        x: Float[Array, "B S D"],
        window: Float[Array, "B W D"],
        documents: Int[Array, "B W"],
        gate: Float[Array, "B S N"],
    ) -> Float[Array, "B S D"]:
        """`window` is `x` with the `w - 1` positions before it. Document 0 is seen by nobody."""
        B, S, D = x.shape
        now = documents[:, self.kernel - 1 :]
        mixed = jnp.zeros((B, S, self.kinds.conv, D), x.dtype)
        for j in range(self.kernel):
            seen = (documents[:, j : j + S] == now) & (now > 0)
            tap = jnp.where(seen[..., None], window[:, j : j + S], 0)[:, :, None]
            mixed += tap * self.depthwise[:, j][None, None].astype(x.dtype)
        # A linear map: to weight its input is to weight its output, and the sum over experts is then
        # one product of matrices.
        return project(mixed * gate[..., None].astype(x.dtype), self.pointwise[...], inputs=2)


def gates_of(choices: Choices, numbers: range) -> Float[Array, "B S N"]:
    """The gate of each of these experts; 0 where a token did not choose it."""
    chosen = jax.nn.one_hot(choices.expert - numbers.start, len(numbers), dtype=bool)  # [B S K N]
    chosen &= choices.valid[..., None]
    return jnp.where(chosen, choices.gate[..., None], 0.0).sum(axis=2)
