"""A language model in training beside transformers' Mixtral of the same sizes, and where ours spends time.

Both: next-token loss with a balance loss, gradients, clipping by the global norm, AdamW, float32. Ours adds
its z loss and the metrics of every step. PyTorch's is run as it is and under `torch.compile`, in a process
of its own, in turn with ours.
"""

import contextlib
from typing import NamedTuple

import numpy as np

from benchmarks import op_times
from benchmarks import peer as peers
from benchmarks.model_run import Training, random_run
from benchmarks.op_times import Shares
from benchmarks.rows import Row, times
from benchmarks.step import parts_note
from benchmarks.timing import Timed, interleave
from moe.cli import complete_config
from moe.config import ConfigDict, default_config


class Sizes(NamedTuple):
    """Of the model and of a batch."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    length: int = 256
    batch: int = 16
    vocabulary: int = 512  # at least the 320 of bytes
    experts: int = 8
    k: int = 2
    hidden: int = 512


def measure(repeats: int, sizes: Sizes = Sizes()) -> list[Row]:  # noqa: B008 - a constant
    """Our step time over theirs, and the share of our step that is no matrix product."""
    ours = Training(random_run(config(sizes), sizes.vocabulary))
    runs: dict[str, Timed] = {"ours": ours}
    with peers.Peer() if peers.installed() else contextlib.nullcontext() as peer:
        note = peers.MISSING
        if peer is not None:
            made = peer.ask("language_model", **theirs(sizes))
            runs |= {kind: peer.timed(kind) for kind in made["runs"]}
            note = made["note"]
        took = interleave(runs, repeats)
    found = []
    for kind in ("compiled", "eager"):
        name = f"language model step / {kind} Mixtral's"
        if kind in took:
            rates = {side: ours.tokens / np.median(took[side]) for side in ("ours", kind)}
            told = f"{rates['ours']:.0f} against {rates[kind]:.0f} tokens/s, {peers.versions()}"
            found.append(times(name, took["ours"], took[kind], note=told))
        else:
            found.append(Row(name, note=note))
    told = [op_times.profile(ours, ours.text) for _ in range(repeats)]
    return [*found, rest_row(told)]


def rest_row(told: list[Shares]) -> Row:
    """The share of everything but products of matrices, round by round; its parts as the note."""
    above = tuple(sum(shares.others.values()) for shares in told)
    name = "language model step outside matrix products"
    return Row(name, above, (1.0,) * len(above), kind="share", note=parts_note(told[-1].others))


def config(sizes: Sizes) -> ConfigDict:
    """Ours, of these sizes."""
    base = default_config()
    base.model.update(
        {
            "num_layers": sizes.layers,
            "width": sizes.width,
            "heads": sizes.heads,
            "kv_heads": sizes.heads,
            "head_dim": sizes.width // sizes.heads,
            "num_experts": sizes.experts,
            "expert_width": sizes.hidden,
        }
    )
    base.router.k = sizes.k
    base.data.update({"batch_size": sizes.batch, "sequence_length": sizes.length})
    return complete_config(base)


def theirs(sizes: Sizes) -> dict[str, int | float]:
    """The same for `torch_side.language_model`."""
    return {
        "batch": sizes.batch,
        "length": sizes.length,
        "clip_norm": default_config().optimizer.clip_norm,
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.k,
        "max_position_embeddings": sizes.length,
    }
