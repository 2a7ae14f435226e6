"""What a collective is for."""

from typing import Any

import pytest

from moe.dryrun.collectives import Collective
from moe.dryrun.hlo import Source
from moe.dryrun.network import network, purpose, weight_gather
from moe.dryrun.shapes import Shape
from tests.dryrun.common import planned

EXPERTS, LOSSES, DISPATCH = (
    "moe/model/experts.py",
    "moe/routing/losses.py",
    "moe/dispatch/exchange.py",
)
ATTENTION, BLOCK = "moe/model/attention.py", "moe/model/transformer.py"


def collective(kind: str, *axes: str, file: str = "", **fields: Any) -> Collective:
    more: dict[str, Any] = dict.fromkeys(Collective._fields, ())
    more |= {"count": 1, "wire_bytes": 0, "group_size": 4, "phase": "forward"}
    source = Source(file, 7) if file else None
    return Collective(**more | {"kind": kind, "axes": axes, "source": source} | fields)


@pytest.mark.parametrize(
    ("kind", "axes", "file", "expected"),
    [
        ("ragged-all-to-all", ("expert",), BLOCK, "exchange"),
        ("all-to-all", ("fsdp", "expert"), "", "exchange"),
        ("all-gather", ("expert",), DISPATCH, "exchange"),
        ("reduce-scatter", ("fsdp", "expert"), DISPATCH, "exchange"),
        ("all-reduce", ("data",), DISPATCH, "parameters and gradients"),  # of experts' weights
        ("all-to-all", ("data", "fsdp", "expert"), BLOCK, "parameters and gradients"),
        ("all-gather", ("fsdp",), EXPERTS, "parameters and gradients"),
        ("collective-permute", ("fsdp",), EXPERTS, "parameters and gradients"),
        ("all-reduce", ("tensor",), EXPERTS, "activations"),
        ("all-gather", ("sequence",), ATTENTION, "activations"),
        ("all-gather", ("fsdp", "sequence"), EXPERTS, "parameters and gradients"),
        ("all-reduce", ("data", "expert"), LOSSES, "statistics"),
        ("all-gather", ("fsdp",), "moe/training/optimizer.py", "parameters and gradients"),
    ],
)
def test_purpose(kind, axes, file, expected):
    assert purpose(collective(kind, *axes, file=file), ("fsdp", "expert")) == expected


def test_sums_and_ratios():
    run = planned("router.k=2", fsdp=2, expert=4)
    found = [
        collective("all-to-all", "expert", count=4, wire_bytes=1000),
        collective("all-to-all", "expert", count=2, wire_bytes=500),
        collective("all-gather", "fsdp", file=EXPERTS, wire_bytes=900),
        collective("all-reduce", "fsdp", file=LOSSES, wire_bytes=4),
    ]
    sent = network(run, found, 256)
    assert [(row["count"], row["bytes"]) for row in sent["rows"]] == [(6, 5000), (1, 900), (1, 4)]
    assert sent["sums"] == {
        "exchange": 5000,
        "parameters and gradients": 900,
        "activations": 0,
        "statistics": 4,
    }
    least = sent["least_of"]
    assert sent["exchange_ratio"] == 5000 / least["exchange"]["bytes"]
    both = least["parameters"]["bytes"] + least["gradients"]["bytes"]
    assert sent["parameters_ratio"] == 900 / both


def test_nothing_to_exchange_has_no_ratio():
    assert network(planned("router.k=2"), [], 256)["exchange_ratio"] is None


def test_weights_that_one_device_gathers():
    run = planned("router.k=2", fsdp=2, expert=4)
    E, D, F = 8, 32, 32
    part = Shape("f32", (E // 4, D, 2, F))
    embedding = Shape("f32", (320, 4 * D + 1))
    found = [
        collective("all-gather", "fsdp", file=EXPERTS, shapes=(part, embedding)),
        collective("all-gather", "expert", file=DISPATCH, shapes=(Shape("f32", (99, 99, F)),)),
    ]
    assert weight_gather(run, found) == 1.0
    half = part._replace(dims=(1, D, 2 * F))
    assert weight_gather(run, [found[0]._replace(shapes=(half,), group_size=2)]) == 0.25
    assert weight_gather(planned("model.pattern=('dense',)"), found) == 0.0
