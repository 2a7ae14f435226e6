"""The text of a compiled program: its instructions, their sizes, and the lines of Python behind them."""

from collections.abc import Iterator
import functools
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b[a-z]+\d*\[([\d,]+)\]")
_CALLED = re.compile(r"(?:calls=%?|to_apply=%?|custom_call_target=\")([\w.\-]+)")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_PRODUCTS = ("dot", "convolution")
_LIBRARIES = ("gemm", "matmul", "blas")  # in the targets of custom calls


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    computation: str
    opcode: str
    elements: tuple[int, ...]  # of every array that it makes; a tuple makes several
    called: str | None  # the computation of a fusion or a call, the target of a custom call
    frame: int  # 0 where no line of Python is behind it


class Place(NamedTuple):
    """A frame of a Python stack."""

    file: str
    function: str


class Program:
    """What is asked of the text."""

    def __init__(self, text: str):
        """`text` is `compiled.as_text()`."""
        self.instructions = {i.name: i for i in _instructions(text)}
        self._tables = _tables(text)
        self._fused = {
            i.called for i in self.instructions.values() if i.opcode == "fusion" and i.called
        }

    def buffers(self) -> Iterator[tuple[str, int]]:
        """Name and elements of every array that memory is set aside for: none inside a fusion."""
        for one in self.instructions.values():
            if one.computation not in self._fused and one.opcode not in ("parameter", "bitcast"):
                yield from ((one.name, size) for size in one.elements)

    def is_product(self, name: str) -> bool:
        """Whether an instruction is a product of matrices, or a fusion around one.

        A custom call is one if its target says so, or if it is a call of `moe/dispatch`, which has no others.
        """
        one = self.instructions.get(name)
        if one is None:
            return False
        if one.opcode == "custom-call":
            dispatch = any("moe/dispatch/" in place.file for place in self.stack(name))
            return dispatch or any(word in (one.called or "").lower() for word in _LIBRARIES)
        inside = () if one.opcode != "fusion" else self._opcodes.get(one.called or "", ())
        return any(opcode in _PRODUCTS for opcode in (one.opcode, *inside))

    @functools.cached_property
    def _opcodes(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for one in self.instructions.values():
            found.setdefault(one.computation, set()).add(one.opcode)
        return found

    def holds_others(self, name: str) -> bool:
        """Whether an instruction runs others that are told of by themselves."""
        one = self.instructions.get(name)
        return one is not None and one.opcode in ("while", "conditional", "call")

    def stack(self, name: str) -> list[Place]:
        """The Python frames behind an instruction, innermost first; none if XLA made it by itself."""
        one, places = self.instructions.get(name), []
        frame = 0 if one is None else one.frame
        while frame:
            location, parent = self._frame(frame)
            places.append(location)
            frame = parent if parent < frame else 0
        return places

    @functools.cache  # noqa: B019 - a program lives as long as its profile
    def _frame(self, frame: int) -> tuple[Place, int]:
        row = _numbers(self._tables["StackFrames"][frame])
        where = _numbers(self._tables["FileLocations"][row["file_location_id"]])
        file = self._tables["FileNames"][where["file_name_id"]].strip('"')
        function = self._tables["FunctionNames"][where["function_name_id"]].strip('"')
        return Place(file, function), row["parent_frame_id"] - 1  # 1 is no frame


def _instructions(text: str) -> Iterator[Instruction]:
    computation = ""
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            head = _COMPUTATION.match(line)
            computation = head[1] if head else computation
            continue
        name, rest = found.groups()
        opcode = _OPCODE.search(" " + rest)
        if opcode is None:
            continue
        made = rest[: opcode.start()]
        sizes = (math.prod(map(int, dims.split(","))) for dims in _SHAPE.findall(made))
        called, frame = _CALLED.search(rest), _FRAME.search(rest)
        yield Instruction(
            name,
            computation,
            opcode[1],
            tuple(sizes),
            called[1] if called else None,
            int(frame[1]) if frame else 0,
        )


def _tables(text: str) -> dict[str, dict[int, str]]:
    """The numbered lines of each table of the header."""
    found: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    current = None
    for line in text.splitlines():
        if line in _TABLES:
            current = line
        elif current is not None:
            number, _, rest = line.partition(" ")
            if not number.isdigit():
                current = None
            else:
                found[current][int(number)] = rest
    return found


def _numbers(row: str) -> dict[str, int]:
    """`{a=1 b=2}` as a dict."""
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}
