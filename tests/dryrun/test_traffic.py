"""Bytes to and from main memory of modules written by hand."""

import pytest

from moe.dryrun.hlo import parse
from moe.dryrun.traffic import memory_traffic

KB = 1024  # f32[256]


def entry(*lines: str, before: str = "") -> int:
    body = "\n".join(f"  {line}" for line in lines)
    header = "HloModule m, is_scheduled=true\n\n"
    text = f"{header}{before}ENTRY %main (p: f32[8,256]) -> f32[8,256] {{\n{body}\n}}\n"
    return memory_traffic(parse(text))


P = "%p = f32[8,256]{1,0} parameter(0)"
INDEX = "%i = s32[] constant(0)"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((P, "ROOT %n = f32[8,256]{1,0} negate(%p)"), 16 * KB),
        ((P, "ROOT %n = f32[8,256]{1,0} add(%p, %p)"), 24 * KB),
        ((P, "ROOT %b = f32[2048]{0} bitcast(%p)"), 0),
        # A slice is read in part, an update in place written in part.
        ((P, INDEX, "ROOT %s = f32[1,256]{1,0} dynamic-slice(%p, %i, %i)"), 2 * KB),
        (
            (
                P,
                INDEX,
                "%u = f32[1,256]{1,0:S(1)} parameter(1)",
                "ROOT %d = f32[8,256]{1,0} dynamic-update-slice(%p, %u, %i, %i)",
            ),
            KB,
        ),
        (
            (
                P,
                INDEX,
                "%u = f32[1,256]{1,0} parameter(1)",
                "ROOT %d = f32[8,256]{1,0} dynamic-update-slice(%p, %u, %i, %i)",
            ),
            2 * KB,
        ),
        # What stays in vector memory costs nothing there.
        ((P, "ROOT %n = f32[8,256]{1,0:S(1)} negate(%p)"), 8 * KB),
        (
            (
                P,
                "%c = (f32[8,256]{1,0:S(1)}, f32[8,256]{1,0}, u32[]{:S(2)}) copy-start(%p)",
                "%d = f32[8,256]{1,0:S(1)} copy-done(%c)",
                "ROOT %n = f32[8,256]{1,0} negate(%d)",
            ),
            16 * KB,
        ),
        (
            (
                P,
                "%c = ((f32[8,256]{1,0}), f32[2,256]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), "
                "slice={[0:2], [0:256]}",
                "ROOT %d = f32[2,256]{1,0:S(1)} slice-done(%c)",
            ),
            2 * KB,
        ),
        (
            (
                P,
                "%g = (f32[8,256]{1,0}, f32[32,256]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}",
                "ROOT %d = f32[32,256]{1,0} all-gather-done(%g)",
            ),
            (8 + 32) * KB,
        ),
    ],
)
def test_one_instruction(lines, expected):
    assert entry(*lines) == expected


def fused(*inside: str, shape: str = "f32[8,256]{1,0}") -> int:
    body = "\n".join(f"  {line}" for line in inside)
    before = (
        f"%f (a: f32[8,256], u: f32[1,256], i: s32[]) -> {shape.split('{')[0]} {{\n{body}\n}}\n\n"
    )
    return entry(
        P,
        "%u = f32[1,256]{1,0} parameter(1)",
        INDEX,
        f"ROOT %x = {shape} fusion(%p, %u, %i), kind=kLoop, calls=%f",
        before=before,
    )


A = "%a = f32[8,256]{1,0} parameter(0)"
U = "%u = f32[1,256]{1,0} parameter(1)"
J = "%j = s32[] parameter(2)"


@pytest.mark.parametrize(
    ("inside", "shape", "expected"),
    [
        # All of `a` (8 KB); `u` and the index are not looked at.
        ((A, U, J, "ROOT %r = f32[8,256]{1,0} negate(%a)"), "f32[8,256]{1,0}", 16 * KB),
        (
            (A, U, J, "ROOT %r = f32[1,256]{1,0} dynamic-slice(%a, %j, %j)"),
            "f32[1,256]{1,0}",
            2 * KB + 4,
        ),
        (
            (
                A,
                U,
                J,
                "%b = f32[8,1,256]{2,1,0} bitcast(%a)",
                "%s = f32[1,1,256]{2,1,0} dynamic-slice(%b, %j, %j, %j)",
                "ROOT %r = f32[1,256]{1,0} bitcast(%s)",
            ),
            "f32[1,256]{1,0}",
            2 * KB + 4,
        ),
        # Sliced, and read whole beside it.
        (
            (
                A,
                U,
                J,
                "%s = f32[1,256]{1,0} dynamic-slice(%a, %j, %j)",
                "%n = f32[8,256]{1,0} negate(%a)",
                "ROOT %r = (f32[1,256]{1,0}, f32[8,256]{1,0}) tuple(%s, %n)",
            ),
            "(f32[1,256]{1,0}, f32[8,256]{1,0})",
            17 * KB + 4,
        ),
        # An update in place: reads and writes what it updates, whatever surrounds it.
        (
            (
                A,
                U,
                J,
                "%n = f32[1,256]{1,0} negate(%u)",
                "ROOT %r = f32[8,256]{1,0} dynamic-update-slice(%a, %n, %j, %j)",
            ),
            "f32[8,256]{1,0}",
            2 * KB + 4,
        ),
        (
            (
                A,
                U,
                J,
                "%d = f32[8,256]{1,0} dynamic-update-slice(%a, %u, %j, %j)",
                "ROOT %r = f32[2048]{0} bitcast(%d)",
            ),
            "f32[2048]{0}",
            2 * KB + 4,
        ),
    ],
)
def test_a_fusion(inside, shape, expected):
    assert fused(*inside, shape=shape) == expected


def test_a_loop_counts_its_trips():
    before = """%body (c: (s32[], f32[8,256])) -> (s32[], f32[8,256]) {
  %c = (s32[], f32[8,256]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  %v = f32[8,256]{1,0} get-tuple-element(%c), index=1
  %one = s32[] constant(1)
  %next = s32[]{:S(2)} add(%k, %one)
  %n = f32[8,256]{1,0} negate(%v)
  ROOT %t = (s32[], f32[8,256]{1,0}) tuple(%next, %n)
}

%cond (c: (s32[], f32[8,256])) -> pred[] {
  %c = (s32[], f32[8,256]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(5)
  ROOT %lt = pred[]{:S(2)} compare(%k, %end), direction=LT
}

"""
    found = entry(
        P,
        INDEX,
        "%start = (s32[], f32[8,256]{1,0}) tuple(%i, %p)",
        "ROOT %w = (s32[], f32[8,256]{1,0}) while(%start), condition=%cond, body=%body",
        before=before,
    )
    counters = 5 * 8 + 6 * 8  # scalars read by the sum and the comparison
    assert found == 5 * 16 * KB + counters
