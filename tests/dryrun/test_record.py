"""The record of a compiled step."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from moe.dryrun import build
from moe.dryrun.build import Compiled, used_and_limit
from moe.dryrun.figures import FIGURES
from moe.dryrun.flops import Product
from moe.dryrun.hlo import Source, parse
from moe.dryrun.record import kernel_rows, make_record, memory, products, unknown_loops
from moe.dryrun.shapes import Shape
from moe.dryrun.show import show
from moe.errors import ConfigError
from tests import tiny
from tests.dryrun import example
from tests.dryrun.common import planned, target

HBM = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
    "40.44G of 15.75G hbm. Exceeded hbm capacity by 24.69G."
)
VMEM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem."


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    run = planned("model.pattern=('dense',)", "model.remat=full", fsdp=8)
    v5e = target()._replace(name="v5e-8", figures=FIGURES["v5e"])
    return make_record(v5e, build.compile_step(run))


def test_a_dense_step_computes_the_least(made):
    work = made["flops"]
    assert work["ratio"] == pytest.approx(1.0, abs=1e-3)
    assert work["phases"]["recompute"] == pytest.approx(work["recompute_ideal"], rel=1e-3)
    assert sum(work["phases"].values()) == pytest.approx(work["compiled"])
    assert (work["kernel_share"], work["tile_padding"]) == (1.0, 0.0)
    assert made["unknown_loops"] == []


def test_it_is_json_and_has_the_keys_that_others_read(made):
    assert json.loads(json.dumps(made)) == made
    assert set(made) == set(example.record()) - {"config", "overrides"}
    for part in ("memory", "flops", "collectives", "peak", "roofline"):
        assert set(made[part]) == set(example.record()[part]), part
    assert "v5e-8: 8 devices, fsdp 8" in show(made)


def test_memory_and_time_add_up(made):
    m, line = made["memory"], made["roofline"]
    assert m["total"] == m["argument"] + m["output"] - m["alias"] + m["temp"] + m["generated_code"]
    assert m["fits"]
    assert sum(m["state"].values()) <= m["argument"]
    assert line["step"] == max(line[name] for name in ("compute", "memory", "network"))
    assert line["compute"] == made["flops"]["compiled"] / FIGURES["v5e"].flops
    assert line["tokens_per_second"] == made["tokens"] / line["step"]
    sent = made["collectives"]
    assert sum(sent["sums"].values()) == sum(row["bytes"] for row in sent["rows"])
    assert sent["exchange_ratio"] is None
    assert sent["parameters_ratio"] > 0.9


STATE = {"params": 4, "router": 0, "optimizer": 8}


def sizes(total: int) -> dict[str, int]:
    return {"argument": total, "output": 9, "alias": 9, "temp": 0, "generated_code": 0}


def test_it_fits_when_the_compiler_agrees_and_the_device_is_large_enough():
    run: Any = planned()
    v5e = target()._replace(figures=FIGURES["v5e"])

    def fits(compiled: Compiled) -> bool:
        return memory(v5e, compiled, STATE)["fits"]

    assert fits(Compiled(run, 1.0, "", sizes(16 * 2**30), None))
    assert not fits(Compiled(run, 1.0, "", sizes(16 * 2**30 + 1), None))
    assert not fits(Compiled(run, 1.0, None, None, HBM))
    assert memory(target(), Compiled(run, 1.0, "", sizes(2**40), None), STATE)[
        "fits"
    ]  # unknown size


@pytest.mark.parametrize(
    ("message", "found"), [(HBM, (40.44 * 2**30, 15.75 * 2**30)), (VMEM, None), ("", None)]
)
def test_sizes_of_a_refusal(message, found):
    assert used_and_limit(message) == found


@pytest.mark.parametrize("message", [HBM, VMEM])
def test_the_record_of_a_refusal(message):
    v5e = target()._replace(figures=FIGURES["v5e"])
    made = make_record(v5e, Compiled(planned("router.k=2", expert=8), 1.0, None, None, message))
    assert set(made) == set(example.refused()) - {"config", "overrides"}
    assert made["memory"]["compiler"] == message
    assert len(made["advice"]) > 1
    page = show(made)
    assert "DOES NOT FIT" in page
    assert ("40.44 GiB of 15.75 GiB" in page) == (message == HBM)
    assert json.loads(json.dumps(made)) == made


def kernel(rows: int, name: str = "grouped_product") -> Product:
    shapes = (Shape("bf16", (rows, 32)), Shape("bf16", (8, 32, 64)), Shape("bf16", (rows, 64)))
    return Product(
        "k", name, "jit(f)/x/y", "forward", Source("moe/a.py", 1), 2 * rows * 32 * 64, 3, shapes
    )


def test_rows_of_the_kernels():
    gradient = kernel(0, "grouped_weight_gradient")._replace(shapes=(Shape("f32", (8, 32, 64)),))
    assert kernel_rows([kernel(100), kernel(80), gradient]) == 100
    assert kernel_rows([kernel(100, "dot"), gradient]) == 0


@pytest.mark.parametrize(
    ("more", "parts"), [("steps=9", 1), ("optimizer.accumulation=2", 2), ("dispatch.chunks=2", 2)]
)
def test_kernels_count_at_even_load(monkeypatch, more, parts):
    run = planned("router.k=2", more, expert=8)
    even = 256 * 2 // 8 // parts
    monkeypatch.setattr(
        "moe.dryrun.flops.products", lambda _: [kernel(2 * even), kernel(10, "dot")]
    )
    module: Any = parse(
        "HloModule m\n\nENTRY %e (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n"
    )
    work = products(run, module, 256)
    assert work["kernel_share"] == 0.5
    assert work["compiled"] == 3 * 2 * 32 * 64 * (even + 10)
    assert list(work["places"]) == ["moe/a.py:1 x/y (forward)"]


WHILE = """HloModule m, is_scheduled=true

%body (c: (s32[], s32[])) -> (s32[], s32[]) {
  %c = (s32[], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  %end = s32[] get-tuple-element(%c), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%k, %one)
  ROOT %t = (s32[], s32[]) tuple(%next, %end)
}

%cond (c: (s32[], s32[])) -> pred[] {
  %c = (s32[], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  %end = s32[] get-tuple-element(%c), index=1
  ROOT %lt = pred[] compare(%k, %end), direction=LT
}

ENTRY %main (p: s32[]) -> (s32[], s32[]) {
  %p = s32[] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], s32[]) tuple(%zero, END)
  ROOT %w = (s32[], s32[]) while(%start), condition=%cond, body=%bodyWHERE
}
"""


def test_loops_as_long_as_the_data_say():
    text = WHILE.replace("END", "%p")
    assert unknown_loops(parse(text.replace("WHERE", ""))) == ["w"]
    place = ', metadata={op_name="jit(f)/while" source_file="moe/x.py" source_line=5}'
    assert unknown_loops(parse(text.replace("WHERE", place))) == ["moe/x.py:5"]
    known = WHILE.replace("END", "%five").replace("  %zero", "  %five = s32[] constant(5)\n  %zero")
    assert unknown_loops(parse(known.replace("WHERE", ""))) == []


def test_vocabulary_without_text():
    assert build.vocabulary(tiny.config()) > 256
    assert build.vocabulary(tiny.config("data.tokenizer=bpe", "data.vocab_size=999")) == 999
    config = tiny.config("data.tokenizer=bpe", "data.vocab_size=999")
    with config.ignore_type():
        config.data.vocab_size = None
    with pytest.raises(ConfigError, match=r"data\.vocab_size=None .* Set data\.vocab_size"):
        build.vocabulary(config)


def test_only_lack_of_memory_is_no_error(monkeypatch):
    class Lowered:
        def compile(self):
            raise build.JaxRuntimeError(message)

    step = SimpleNamespace(lower=lambda *_: Lowered())
    monkeypatch.setattr(build.programs, "jit_train_step", lambda _: step)
    message = HBM
    found = build.compile_step(planned())
    assert (found.text, found.memory, found.failure) == (None, None, HBM)
    message = "INTERNAL: a bug"
    with pytest.raises(build.JaxRuntimeError, match="a bug"):
        build.compile_step(planned())
