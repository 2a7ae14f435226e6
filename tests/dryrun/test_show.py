"""Records as text: pages, differences, tables."""

import pytest

from moe.dryrun.show import count, differences, numbers, show
from moe.dryrun.table import COLUMNS, table
from moe.units import duration, memory_size, sent_size
from tests.dryrun.example import record, refused


def test_a_page_of_everything():
    page = show(record())
    for said in (
        "v5p-128: 64 devices, fsdp 8 x expert 8, rules hybrid; 46.70B parameters, 12.88B active",
        "memory     fits: 25.00 GiB of 95.00 GiB",
        "params 3.00 GiB; optimizer 6.00 GiB; router 0 B; temporaries 16.00 GiB; at the peak (estimated 10.00",
        "4.000e+14 compiled, 2.000e+14 least (recomputation 5.00e+13 of it): ratio 2.000",
        "80% of their buffers; tiles add 5.0% of these rows",
        "75.0%  moe/model/experts.py:65 dot (forward)",
        "3.76 GB ragged-all-to-all",
        "exchange: 7.52 GB sent, 3.76 GB least: 2.00 x",
        "parameters and gradients: 40.00 kB sent, 20.00 kB least: 2.00 x",
        "statistics: 12 B sent\n",
        "0.9 s if all overlaps, 1.7 s if nothing does (compute 0.9 s, memory 0.6 s, network 0.2 s, slow",
        "bound by compute; at best 291,271 tokens/s, 50% of the peak",
        "2.00 GiB f32[8,4096,16384]            recompute  jit(train_step)/dot_general",
        "0.10% dropped, 20.0% of rows empty (10240 rows)",
        "advice     The step computes 2.00 times",
    ):
        assert said in page
    assert "activations: " not in page  # nothing sent and nothing due


def test_a_page_without_some_of_it():
    cpu = record(mesh={}, waste=None, advice=[])
    del cpu["roofline"]
    cpu["memory"]["limit"] = None
    cpu["flops"]["tile_padding"] = 0.0
    page = show(cpu)
    assert "one device" in page
    assert "25.00 GiB of unknown" in page
    for absent in ("roofline", "waste", "advice", "tiles add"):
        assert absent not in page


@pytest.mark.parametrize("compiler", ["RESOURCE_EXHAUSTED: Ran out of memory\nlong list", "", "\n"])
def test_a_step_that_did_not_compile(compiler):
    page = show(refused(compiler))
    assert "DOES NOT FIT: refused by the compiler, size unstated, of 95.00 GiB" in page
    assert ("Ran out of memory" in page) == bool(compiler.strip())
    assert "long list" not in page
    failed = refused(compiler)
    failed["memory"]["total"] = 99 * 2**30
    assert "DOES NOT FIT: 99.00 GiB of 95.00 GiB" in show(failed)


def test_differences_are_ratios():
    new = record(target="v5p-64", tokens=131_072, devices=64)
    new["memory"]["state"]["router"] = 5
    lines = differences(record(), new).splitlines()
    assert lines[0].split() == ["v5p-128", "v5p-64", "ratio"]
    assert [line.split() for line in lines[1:]] == [
        ["tokens", "2.621e+05", "1.311e+05", "0.500"],
        ["memory.state.router", "0", "5"],  # no ratio to nothing
    ]
    assert differences(record(), record()).count("\n") == 0


def test_differences_to_a_step_that_did_not_compile():
    for old, new in ((record(), refused()), (refused(), record())):
        last = differences(old, new).splitlines()[-1]
        assert last.startswith("only in one of them: collectives.exchange_ratio, ")
        assert "memory.temp" in last
        assert "roofline.step" in last


def test_numbers_leave_out_what_cannot_be_compared():
    found = dict(numbers(record()))
    assert found["roofline.step"] == 0.9
    assert found["collectives.sums.exchange"] == 7_516_192_768.0
    assert not any(key.startswith(("versions", "dispatch", "flops.places")) for key in found)
    assert "memory.fits" not in found


def test_table_has_a_row_for_each_record():
    text = table([record(), refused()])
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    assert [len(row) for row in rows] == [len(COLUMNS)] * 4
    assert rows[2] == [
        "`configs/scaling.py:mixtral_8x7b`, mesh.rules=hybrid",
        "46.70B, 12.88B active",
        "v5p-128: 64 devices",
        "fsdp 8 x expert 8, hybrid",
        "fits: 25.00 GiB of 95.00 GiB",
        "4.000e+14, 2.000",
        "7.52 GB, 2.00",
        "0.250 of a layer's experts",
        "0.9 s, compute",
        "291,271",
        "369 s",
    ]
    assert rows[3][4:] == ["does not fit: more of 95.00 GiB", *"-----", "369 s"]


def test_table_of_a_dense_model_on_a_cpu():
    dense = record(mesh={})
    del dense["roofline"]
    dense["memory"]["limit"] = None
    dense["collectives"]["exchange_ratio"] = None
    row = table([dense]).splitlines()[2]
    assert "| one device, hybrid | fits: 25.00 GiB | 4.000e+14, 2.000 | - |" in row


def test_units():
    assert [memory_size(n) for n in (0, 1023, 1024, 1.5 * 2**30, 2.0**51)] == [
        *("0 B", "1023 B", "1.00 KiB", "1.50 GiB", "2048.00 TiB")
    ]
    assert [sent_size(n) for n in (999, 1000, 2.5e6, 4e12)] == [
        "999 B",
        "1.00 kB",
        "2.50 MB",
        "4.00 TB",
    ]
    assert [duration(s) for s in (12.345, 0.98, 0.0321, 4.5e-6)] == [
        "12.3 s",
        "0.98 s",
        "32.1 ms",
        "4.5 us",
    ]
    assert [count(n) for n in (46.7e9, 6.2e6, 53_920)] == ["46.70B", "6.2M", "53,920"]
