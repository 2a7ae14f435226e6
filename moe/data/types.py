"""The batch: the one structure that goes from the data to the model."""

from typing import Any, NamedTuple

from jaxtyping import Bool, Int

AnyArray = Any  # numpy on the host, jax.Array on devices, jax.ShapeDtypeStruct before compiling


class Batch(NamedTuple):
    """Packed documents: each is `boundary, t1 ... tn`; its targets are `t1 ... tn, boundary`."""

    tokens: Int[AnyArray, "B S"]  # int32; 0 where padding
    targets: Int[AnyArray, "B S"]  # int32; the next token of the same document; 0 where padding
    segments: Int[AnyArray, "B S"]  # int32; 1, 2, ... by document in the row, 0 where padding
    positions: Int[AnyArray, "B S"]  # int32; position inside the document's part of the row
    valid: Bool[AnyArray, "B S"]  # True for a real token: the only padding mask there is
    domain: Int[AnyArray, " B"]  # int32; index of the row's text domain
