"""Reads the text of a compiled module (`compiled.as_text()`) of XLA's CPU, TPU and CUDA compilers.

Text, because it is what every back end gives and what can be kept beside a report and read again
elsewhere: the serialised proto needs XLA's proto definitions, which no installed package ships, and
the Python objects of `hlo_modules()` name computations without their instructions.

Attributes stay text until asked for: a module of a large model has tens of megabytes, most of it
back-end configuration that nobody reads.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
import re
from typing import NamedTuple

from moe.dryrun.shapes import Shape, leaves, parse_shape

ROOT = Path(__file__).resolve().parents[2]
# Files of this repository, relative to its root, whose lines a report may point to.
OWN = ("moe/", "train.py")

_INSTRUCTION = re.compile(
    r"\s*(ROOT )?%?([^\s=]+) = (\(.*?\)(?= [a-z][\w\-]*\()|[^\s(]\S*) ([a-z][\w\-]*)\("
)
_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
_OPERAND = re.compile(r"%([^\s,()]+)")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([^\s,{}]+)"
    r"|\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_NEARBY = 8
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


class Source(NamedTuple):
    """A line of code; `file` is relative to the repository's root where it lies inside."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Instruction:
    """One instruction.

    Args:
      name: unique in its computation.
      opcode: such as `dot` or `all-gather-start`.
      shape_text: the output's shape.
      operand_text: what stands between the parentheses.
      tail: the attributes, metadata and back-end configuration after them.
      is_root: whether its output is the computation's.
    """

    def __init__(
        self, name: str, opcode: str, shape_text: str, operand_text: str, tail: str, is_root: bool
    ):
        self.name = name
        self.opcode = opcode
        self.shape_text = shape_text
        self.operand_text = operand_text
        self.tail = tail
        self.is_root = is_root

    def __repr__(self) -> str:
        return f"Instruction({self.name}: {self.shape_text[:60]} {self.opcode})"

    @cached_property
    def shape(self) -> Shape | tuple:
        """The output's shape; nested tuples where it is a tuple."""
        return parse_shape(self.shape_text)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the output."""
        return leaves(self.shape)

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions it reads."""
        return tuple(_OPERAND.findall(self.operand_text))

    @cached_property
    def _parts(self) -> tuple[str, str, str]:
        rest, _, backend = self.tail.partition(", backend_config=")
        attributes, _, metadata = rest.partition(", metadata={")
        return attributes, metadata, backend

    @property
    def attributes(self) -> str:
        """Attributes without metadata and back-end configuration."""
        return self._parts[0]

    @property
    def metadata(self) -> str:
        """`op_name="..." stack_frame_id=...`."""
        return self._parts[1]

    @property
    def backend_config(self) -> str:
        """Usually JSON."""
        return self._parts[2]

    @property
    def op_name(self) -> str:
        """JAX's path of transformations, scopes and the primitive."""
        found = _OP_NAME.search(self.metadata)
        return found.group(1) if found else ""

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls, in the order of the text."""
        names: list[str] = []
        for one, many in _CALLED.findall(self.attributes):
            names += [one] if one else [name.strip().lstrip("%") for name in many.split(",")]
        return tuple(name for name in names if name)

    def attribute(self, key: str, pattern: str) -> str | None:
        """What `pattern` matches after `key=`, or None where the attribute is absent."""
        found = re.search(rf"\b{key}=({pattern})", self.attributes)
        return found.group(1) if found else None

    def dims(self, key: str) -> tuple[int, ...]:
        """A list of dimensions such as `lhs_contracting_dims={1}`; empty where absent."""
        text = self.attribute(key, r"\{[\d,\s]*\}") or "{}"
        return tuple(int(dim) for dim in re.findall(r"\d+", text))


class Computation:
    """Instructions by name, in the order of the text, which is the schedule in a compiled module."""

    def __init__(self, name: str, is_entry: bool):
        self.name = name
        self.is_entry = is_entry
        self.instructions: dict[str, Instruction] = {}

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def operand_shapes(self, instruction: Instruction) -> tuple[Shape, ...]:
        """The arrays that an instruction reads."""
        return tuple(shape for name in instruction.operands for shape in self[name].shapes)

    def users(self, instruction: Instruction) -> tuple[str, ...]:
        """Names of the instructions that read its output."""
        return tuple(each.name for each in self if instruction.name in each.operands)

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose output is the computation's."""
        return next(each for each in self if each.is_root)


class Module:
    """A compiled module.

    Args:
      header: the first line.
      computations: by name.
      tables: rows of the tables of stack frames by table and number.
      own: prefixes of the files that `source` may return.
    """

    def __init__(
        self,
        header: str,
        computations: dict[str, Computation],
        tables: dict[str, dict[int, str]],
        own: tuple[str, ...] = OWN,
    ):
        self.header = header
        self.computations = computations
        self.own = own
        self._tables = tables
        self._sources: dict[int, Source | None] = {}

    @cached_property
    def entry(self) -> Computation:
        """Where execution begins."""
        return next(each for each in self.computations.values() if each.is_entry)

    @cached_property
    def partitions(self) -> int:
        """Devices that run it."""
        found = re.search(r"num_partitions=(\d+)", self.header)
        return int(found.group(1)) if found else 1

    @cached_property
    def _callers(self) -> dict[str, tuple[Computation, Instruction]]:
        return {
            called: (computation, each)
            for computation in self.computations.values()
            for each in computation
            for called in each.called
        }

    def described(self, computation: Computation, instruction: Instruction) -> Instruction:
        """The instruction, or the nearest inside or around it that says where it comes from.

        What a compiler pass builds anew carries no metadata; the fusion around it, or the root of the
        fusion that it is, mostly does.
        """
        inside = instruction
        while not inside.op_name and inside.opcode == "fusion":
            inside = self.computations[inside.called[0]].root
        around = (computation, inside if inside.op_name else instruction)
        while not around[1].op_name and around[0].name in self._callers:
            around = self._callers[around[0].name]
        return around[1] if around[1].op_name else instruction

    def nearby_source(self, computation: Computation, instruction: Instruction) -> Source | None:
        """The line behind what an instruction reads, else what reads it, for one that states none.

        Inside a fusion the search goes on from the fusion.
        """
        around = (computation, instruction)
        while True:
            found = self._first_source(*around, backwards=True)
            found = found or self._first_source(*around, backwards=False)
            if found or around[0].name not in self._callers:
                return found
            around = self._callers[around[0].name]

    def _first_source(
        self, computation: Computation, instruction: Instruction, *, backwards: bool
    ) -> Source | None:
        for _ in range(_NEARBY):
            names = instruction.operands if backwards else computation.users(instruction)
            # The metadata of a parameter is the argument's name and its frame that of the call.
            if not names or computation[names[0]].opcode == "parameter":
                return None
            instruction = computation[names[0]]
            found = self.source(instruction)
            if found:
                return found
        return None

    def is_fused(self, computation: Computation) -> bool:
        """Whether it is what a fusion computes, so that its inner arrays never reach memory."""
        caller = self._callers.get(computation.name)
        return caller is not None and caller[1].opcode == "fusion"

    def source(self, instruction: Instruction) -> Source | None:
        """The innermost line of our code on the instruction's stack; None where it has none."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.metadata)
        if frame:
            return self._frame_source(int(frame.group(1)))
        place = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.metadata)
        return self._own(place.group(1), int(place.group(2)), "") if place else None

    def _frame_source(self, frame: int) -> Source | None:
        if frame not in self._sources:
            self._sources[frame] = next(
                (own for own in (self._own(*place) for place in self.stack(frame)) if own), None
            )
        return self._sources[frame]

    def stack(self, frame: int) -> Iterator[tuple[str, int, str]]:
        """`(file, line, function)` from the innermost frame outwards."""
        while frame in self._tables["StackFrames"]:
            row = _numbers(self._tables["StackFrames"][frame])
            place = _numbers(self._tables["FileLocations"][row["file_location_id"]])
            yield (
                self._tables["FileNames"][place["file_name_id"]].strip('"'),
                place["line"],
                self._tables["FunctionNames"][place["function_name_id"]].strip('"'),
            )
            # The text prints the number of the parent plus one: the outermost frame names itself.
            frame = row["parent_frame_id"] - 1

    def _own(self, file: str, line: int, function: str) -> Source | None:
        relative = file.removeprefix(f"{ROOT}/")
        return Source(relative, line, function) if relative.startswith(self.own) else None


def parse(text: str, own: tuple[str, ...] = OWN) -> Module:
    """Reads a module.

    Args:
      text: `compiled.as_text()`.
      own: prefixes of the files, relative to the repository's root, that count as ours.

    Raises:
      ValueError: a line is not what XLA prints there.
    """
    lines = text.split("\n")
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    table: dict[int, str] | None = None
    computation: Computation | None = None
    for line in lines[1:]:
        if computation is not None:
            if line.startswith("}"):
                computation = None
                continue
            instruction = _instruction(line)
            computation.instructions[instruction.name] = instruction
        elif line in tables:
            table = tables[line]
        elif not line.strip():
            table = None
        elif table is not None:
            number, _, row = line.partition(" ")
            table[int(number)] = row
        else:
            computation = _computation(line)
            computations[computation.name] = computation
    return Module(lines[0], computations, tables, own)


def _computation(line: str) -> Computation:
    header = _HEADER.match(line)
    if header is None:
        raise ValueError(f"neither a computation nor a table of XLA: {line[:100]!r}")
    return Computation(header.group(2), bool(header.group(1)))


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    if found is None:
        raise ValueError(f"not an instruction of XLA: {line[:100]!r}")
    root, name, shape, opcode = found.groups()
    end = _closing(line, found.end())
    return Instruction(name, opcode, shape, line[found.end() : end], line[end + 1 :], bool(root))


def _closing(line: str, start: int) -> int:
    """The place of the parenthesis that closes the one before `start`."""
    end = line.find(")", start)
    while end >= 0 and line.count("(", start, end) != line.count(")", start, end):
        end = line.find(")", end + 1)
    return end


def _numbers(row: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}
