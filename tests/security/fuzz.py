"""Random input for everything that reads: it gives a result or an error meant for people, never another."""

from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
import pytest

from moe.errors import UserError


def _is_local(path: str) -> bool:
    del path
    return False


# Hypothesis also draws the literals of every local module that happens to be imported: the same test would
# see other inputs after other tests, and after any edit of the sources.
providers.is_local_module_file = _is_local


def sizes(quick: int) -> Any:
    """Runs a test with `examples` that every push can afford, and with many more under `slow`."""
    many = pytest.param(quick * 40, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
    return pytest.mark.parametrize("examples", [quick, many])


def some(quick: int, slow: int) -> Any:
    """As `sizes`, for what is dear: so many examples for every push, and so many under `slow`."""
    many = pytest.param(slow, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
    return pytest.mark.parametrize("examples", [quick, many])


def check(examples: int, holds: Callable[[Any], Any], inputs: st.SearchStrategy) -> None:
    """Calls `holds` with so many inputs; a UserError with a message is an answer as good as another.

    The quick profile draws the same inputs every time, the long one others.
    """

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 5000,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),  # to explain takes minutes
    )
    @given(inputs)
    def one(value):
        message = "a result"
        try:
            holds(value)
        except UserError as error:
            message = str(error)
        assert message.strip()

    one()


# ---- values

# Of any kind that JSON or a Python literal can say.
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 10**400, -1, 0])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["", "nan", "a.b", "../x", "/etc/passwd", "\0", "\ud800", "\u2028", "x" * 9000]
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=8,
)


# ---- bytes


@st.composite
def mutated(draw: st.DrawFn, originals: st.SearchStrategy[bytes]) -> bytes:
    """A true file after a few edits: flipped, cut, doubled, overwritten, filled with others' bytes."""
    data = bytearray(draw(originals))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        to = draw(st.integers(at, min(len(data), at + 64)))
        kind = draw(st.sampled_from(("flip", "cut", "double", "overwrite", "end", "insert")))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:to]
        elif kind == "double":
            data[at:at] = data[at:to]
        elif kind == "overwrite":
            data[at:to] = draw(st.binary(max_size=to - at, min_size=to - at))
        elif kind == "end":
            del data[at:]
        else:
            data[at:at] = draw(
                st.binary(max_size=16) | st.sampled_from((b"-1", b"99999999999", b"["))
            )
    return bytes(data)


def mutated_of(*originals: bytes) -> st.SearchStrategy[bytes]:
    """Edits of any of these, and bytes that are nothing."""
    return mutated(st.sampled_from(originals)) | st.binary(max_size=200)


@st.composite
def mutated_json(draw: st.DrawFn, original: Any) -> Any:
    """A JSON value with one or two parts replaced by something else, or left out."""
    value = original
    for _ in range(draw(st.integers(1, 2))):
        value = _mutate(draw, value)
    return value


def _mutate(draw: st.DrawFn, value: Any) -> Any:
    if draw(st.integers(0, 3)) == 0 or not value or not isinstance(value, dict | list):
        return draw(values)
    if isinstance(value, dict):
        key = draw(st.sampled_from(sorted(value)))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if draw(st.integers(0, 4)) == 0 else rest | {key: _mutate(draw, value[key])}
    at = draw(st.integers(0, len(value) - 1))
    return [*value[:at], _mutate(draw, value[at]), *value[at + 1 :]]


# Nested or long beyond what a parser takes.
DEEP = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"event": ' + b"[" * 100_000,
    b"9" * 5000,
    b'{"step": ' + b"9" * 5000,
]


def json_files(
    original: Any, renew: Callable[[Any], Any] = lambda value: value
) -> st.SearchStrategy:
    """Bytes in place of a JSON file.

    Another value, its checksum renewed by `renew`; a key that stands twice; damaged bytes; no JSON.
    """
    text = json.dumps(renew(original)).encode()
    twice = b'{"%s": [], ' % next(iter(original), "x").encode() + text[1:]
    return st.one_of(
        *[mutated_json(original).map(lambda value: json.dumps(renew(value)).encode())] * 4,
        mutated_of(text),
        st.sampled_from([*DEEP, b"", b"\xff\xfe", text + b"\xff", text * 2, twice]),
    )


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that lies below a folder: name -> bytes, None of what is no file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
