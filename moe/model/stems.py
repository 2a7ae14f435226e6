"""Stems: what makes the first positions of a row of frames, patches of a picture or log-mel spectra."""

from collections.abc import Callable
import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.data.types import STEM_STRIDE
from moe.errors import ConfigError
from moe.model.experts import fan_in_init, project
from moe.model.spec import Stem
from moe.parallel.rules import constrain_rows

KERNEL = 3  # frames that one output of a convolution sees
STRIDE = math.isqrt(STEM_STRIDE)  # of each of two convolutions
POSITION_SCALE = 0.02  # of fresh position embeddings, as in ViT


class PatchStem(nnx.Module):
    """Linear map of every patch and a learned position (ViT, Dosovitskiy et al. 2021, arXiv:2010.11929).

    With `hidden`, a perceptron with one hidden layer in place of the linear map.
    """

    def __init__(self, stem: Stem, width: int, *, rngs: nnx.Rngs):
        """To the model's `width`, from `stem.size` numbers a patch, `stem.frames` of them a row."""
        size = stem.size
        if stem.hidden:
            self.wi = nnx.Param(
                fan_in_init(size)(rngs.params(), (size, stem.hidden)), axes=(None, "F")
            )
            size = stem.hidden
        letter = "F" if stem.hidden else None
        self.wo = nnx.Param(fan_in_init(size)(rngs.params(), (size, width)), axes=(letter, "D"))
        draw = nnx.initializers.normal(POSITION_SCALE)
        self.position = nnx.Param(draw(rngs.params(), (stem.frames, width)), axes=(None, "D"))

    def __call__(
        self, frames: Float[Array, "B N F"], valid: Bool[Array, "B N"]
    ) -> Float[Array, "B N D"]:
        """One position a patch, in the dtype of `frames`; those that are not valid mean nothing."""
        x = jnp.where(valid[..., None], frames, 0.0)
        if hasattr(self, "wi"):
            x = jax.nn.gelu(project(x, self.wi[...]))
        return project(x, self.wo[...]) + self.position[...].astype(x.dtype)[None]


class ConvStem(nnx.Module):
    """Two convolutions over time with GELU, each of stride 2 (Whisper: Radford et al. 2022, arXiv:2212.04356).

    Whisper's first one has stride 1; with two strides a position stands for 4 frames. What is no real
    frame counts as 0 in both layers, so that a row's length of padding changes nothing.
    """

    def __init__(self, stem: Stem, width: int, *, rngs: nnx.Rngs):
        """To the model's `width`, from `stem.size` numbers a frame."""
        self.first = Convolution(stem.size, width, rngs=rngs)
        self.second = Convolution(width, width, rngs=rngs)

    def __call__(
        self, frames: Float[Array, "B N F"], valid: Bool[Array, "B P"]
    ) -> Float[Array, "B P D"]:
        """`P = N / 4` positions, in the dtype of `frames`; those that are not valid mean nothing."""
        there = jnp.repeat(valid[..., None], STRIDE, axis=1)  # [B 2P 1]
        x = jnp.where(jnp.repeat(there, STRIDE, axis=1), frames, 0.0)
        return self.second(jnp.where(there, self.first(x), 0.0))


class Convolution(nnx.Module):
    """`gelu(b + sum_k x[2i + k - 1] W[k])` for k = 0, 1, 2; zeros beyond the ends."""

    def __init__(self, size: int, width: int, *, rngs: nnx.Rngs):
        """From `size` to `width` channels."""
        shape = (KERNEL, size, width)
        self.kernel = nnx.Param(
            fan_in_init(KERNEL * size)(rngs.params(), shape), axes=(None, None, "D")
        )
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,))

    def __call__(self, x: Float[Array, "B N X"]) -> Float[Array, "B M D"]:
        """`M = N / 2` positions."""
        # One product of matrices of the three frames side by side: [B M 3X].
        pairs = x.reshape(x.shape[0], -1, STRIDE, x.shape[2])
        before = jnp.pad(pairs[:, :-1, 1], ((0, 0), (1, 0), (0, 0)))
        taps = jnp.stack([before, pairs[:, :, 0], pairs[:, :, 1]], axis=2)
        y = project(taps, self.kernel[...], inputs=2)
        return jax.nn.gelu(y + self.bias[...].astype(y.dtype)[None, None])


class StemKind(NamedTuple):
    """One way to make positions of frames."""

    module: Callable[..., nnx.Module]  # (stem, width, *, rngs); called with frames and a mask
    frames: int = 1  # that make one position


STEMS: dict[str, StemKind] = {
    "patches": StemKind(PatchStem),
    "conv": StemKind(ConvStem, STEM_STRIDE),
}


def make_stem(stem: Stem, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """The module of a checked stem."""
    return STEMS[stem.kind].module(stem, width, rngs=rngs)


def stem_positions(stem: Stem) -> int:
    """Positions that the frames of a row take."""
    return stem.frames // STEMS[stem.kind].frames


def place(
    made: nnx.Module,
    x: Float[Array, "B S D"],
    frames: Float[Array, "B N F"],
    from_frames: Bool[Array, "B S"],
    count: int,
) -> Float[Array, "B S D"]:
    """The stem's output at those of the first positions that are made of frames.

    Args:
        made: the stem.
        x: embeddings of the tokens.
        frames: of each row.
        from_frames: which positions hold the stem's output; none but the first `count` can.
        count: positions of the stem.

    Raises:
        ValueError: fewer positions than the stem fills.
    """
    if x.shape[1] < count:
        raise ValueError(f"{x.shape[1]} positions cannot hold {count} of the stem")
    valid = from_frames[:, :count]
    new = made(constrain_rows(frames.astype(x.dtype)), constrain_rows(valid))
    new = jnp.pad(constrain_rows(new), ((0, 0), (0, x.shape[1] - count), (0, 0)))
    here = from_frames & (jnp.arange(x.shape[1]) < count)[None]
    return jnp.where(here[..., None], new, x)


def check(stem: Stem, sequence_length: int) -> None:
    """Checks a stem before anything compiles.

    Raises:
        ConfigError: an unknown kind, or frames that do not fit into a row.
    """
    if stem.kind not in STEMS:
        raise ConfigError(f"stem {stem.kind!r} is not one of {', '.join(STEMS)}; choose one.")
    group = STEMS[stem.kind].frames
    if stem.frames < group or stem.frames % group:
        raise ConfigError(
            f"{stem.frames} frames a row are no multiple of {group}, as many as make one position of the "
            f"stem {stem.kind!r}. The next number that fits is {max(-(-stem.frames // group), 1) * group}."
        )
    if stem.hidden and stem.kind != "patches":
        raise ConfigError(
            f"hidden={stem.hidden} with the stem {stem.kind!r}: only 'patches' has a hidden layer. Set it "
            "to 0."
        )
    if stem_positions(stem) > sequence_length:
        raise ConfigError(
            f"data.sequence_length={sequence_length} is less than the {stem_positions(stem)} positions that "
            f"{stem.frames} frames take: make rows longer, or frames fewer."
        )
