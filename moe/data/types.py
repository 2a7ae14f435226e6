"""The batch: the one structure that goes from the data to the model."""

from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int

AnyArray = Any  # numpy on the host, jax.Array on devices, jax.ShapeDtypeStruct before compiling

TEXT, FRAMES = 0, 1  # kinds of positions in `Batch.modality`
STEM_STRIDE = 4  # log-mel frames to one position: two convolutions halve their number


class Batch(NamedTuple):
    """Rows of tokens, with frames of pictures or sound where a task has them.

    Packed documents are `boundary, t1 ... tn` with the targets `t1 ... tn, boundary`. A row of one
    example holds it whole; `moe.data.example_rows` has the layout for each task. Fields that a task
    has no use for are None.
    """

    tokens: Int[AnyArray, "B S"]  # int32; 0 where padding, and where frames are
    targets: Int[AnyArray, "B S"]  # int32; the next token of the same document; 0 where padding
    segments: Int[AnyArray, "B S"]  # int32; 1, 2, ... by document in the row, 0 where padding
    positions: Int[AnyArray, "B S"]  # int32; position inside the document's part of the row
    valid: Bool[AnyArray, "B S"]  # True for a real token: the only padding mask there is
    domain: Int[AnyArray, " B"]  # int32; index of the row's domain
    scored: Bool[AnyArray, "B S"] | None = None  # targets that count; None: all valid ones
    prefix: Bool[AnyArray, "B S"] | None = None  # positions that all of their document may see
    modality: Int[AnyArray, "B S"] | None = None  # TEXT or FRAMES; None: all text
    frames: Float[AnyArray, "B N F"] | None = None  # patches of a picture, or log-mel frames
    label: Int[AnyArray, " B"] | None = None  # int32; class of the row; None: its domain
    index: Int[AnyArray, " B"] | None = None  # int32; example in its split, -1 in padding rows


ROW_FIELDS = ("domain", "label", "index")  # one number a row
BY_POSITION = tuple(n for n in Batch._fields if n not in (*ROW_FIELDS, "frames"))  # [B S]
