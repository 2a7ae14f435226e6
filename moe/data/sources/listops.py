"""ListOps: the value of a nested expression of lists of digits, made here, with an exact solver.

The grammar is that of the Long Range Arena (Nangia and Bowman 2018; Tay et al. 2021, section 2.2):
`[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]` is 5. Operators are MAX, MIN, MED (the median, rounded
down) and SM (the sum modulo 10). Lists have 2 to 5 arguments here, 10 there.

Drawn bottom-up, as there, nearly all deep MAX are 9. Here values go down: root operator and answer
follow from the index, so all 40 combinations are equally frequent, and the arguments of a list are
drawn uniformly from all that give its value.
"""

from collections.abc import Iterator
import dataclasses
import functools
import random
from typing import Any, NamedTuple

from jaxtyping import Int8
import numpy as np
import tensorflow_datasets as tfds

from moe.data.packages import Package
from moe.data.sources.builder import PackageBuilder, PackageConfig
from moe.data.sources.types import SPLITS
from moe.errors import DataError

PACKAGES: tuple[Package, ...] = ()
OPERATORS = ("MAX", "MIN", "MED", "SM")

_MOST_ARGUMENTS = 5
_DIGITS = 10
_LONG = "test_long"  # the split of longer expressions

Shape = tuple[Any, ...]  # of an expression: the shapes of its arguments; () is a digit


@dataclasses.dataclass(eq=False)
class ListopsConfig(PackageConfig):
    """Sizes of expressions, in tokens: a digit, `[MAX` and `]` are one each."""

    shortest: int = 20
    longest: int = 80
    deepest: int = 4  # lists within lists
    nesting: float = 0.45  # probability that an argument is a list
    train: int = 50_000  # examples
    held_out: int = 2_000  # examples of each other split


class Listops(PackageBuilder):
    """Expressions in the grammar of ListOps and their values, a class for each digit, all equally frequent.

    `test_long` has expressions up to twice as long as those of the other splits. The domain is the
    outermost operator. A token has at most 3 bytes: rows of 256 hold `short`, of 1,024 `medium`; `lra`
    has the lengths of the Long Range Arena.
    An example is a function of config, split and index alone. Licence of the data: none is needed.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        ListopsConfig(name="short"),
        ListopsConfig(
            name="medium", shortest=120, longest=330, deepest=8, nesting=0.4, train=30_000
        ),
        ListopsConfig(
            name="lra",
            shortest=500,
            longest=2_000,
            deepest=10,
            nesting=0.47,
            train=10_000,
            held_out=1_000,
        ),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Nested operations on lists of digits; the class is the value.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=[str(i) for i in range(_DIGITS)]),
                    "domain": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in (*SPLITS, _LONG)}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        config: Any = self.builder_config
        for index in range(config.train if split == "train" else config.held_out):
            text, value, operator = make_expression(config, split, index)
            yield index, {"text": text, "label": str(value), "domain": operator}


class Expression(NamedTuple):
    """An expression with its value and its outermost operator."""

    text: str
    value: int
    operator: str


def make_expression(config: ListopsConfig, split: str, index: int) -> Expression:
    """Makes the expression of a number: index modulo 10 is its value, index // 10 modulo 4 its operator."""
    rng = random.Random(f"listops {config.name} {split} {index}")  # seeds from a string by SHA-512
    longer = split == _LONG
    low = config.longest + 1 if longer else config.shortest
    high = 2 * config.longest if longer else config.longest
    value = index % _DIGITS
    operator = OPERATORS[index // _DIGITS % len(OPERATORS)]
    shape: Shape = ()
    while not low <= length(shape) <= high:
        shape = _draw_list(rng, config, config.deepest, high) or ()
    text = " ".join(_fill(shape, operator, value, rng))
    return Expression(text, value, operator)


def length(shape: Shape) -> int:
    """The number of tokens of an expression."""
    return 2 + sum(map(length, shape)) if shape else 1


def _draw_list(rng: random.Random, config: ListopsConfig, depth: int, budget: int) -> Shape | None:
    """Draws the shape of a list at most `depth` deep; None where it exceeds `budget` tokens."""
    arguments: list[Shape] = []
    budget -= 2
    for _ in range(rng.randint(2, _MOST_ARGUMENTS)):
        shape: Shape | None = ()
        if depth > 1 and rng.random() < config.nesting:
            shape = _draw_list(rng, config, depth - 1, budget)
        if shape is None:
            return None
        arguments.append(shape)
        budget -= length(shape)
        if budget < 0:
            return None
    return tuple(arguments)


def _fill(shape: Shape, operator: str, value: int, rng: random.Random) -> Iterator[str]:
    """Yields the tokens of an expression of a shape that has the value."""
    choices = arguments_of(operator, len(shape))[value]
    yield f"[{operator}"
    for argument, digit in zip(shape, choices[rng.randrange(len(choices))].tolist(), strict=True):
        if argument:
            yield from _fill(argument, rng.choice(OPERATORS), digit, rng)
        else:
            yield str(digit)
    yield "]"


@functools.cache
def arguments_of(operator: str, number: int) -> tuple[Int8[np.ndarray, "n k"], ...]:
    """All lists of `number` digits, by the value that the operator gives them: 10 arrays [n, number]."""
    lists = np.indices((_DIGITS,) * number, np.int8).reshape(number, -1).T
    values = {
        "MAX": lambda: lists.max(axis=1),
        "MIN": lambda: lists.min(axis=1),
        "MED": lambda: np.median(lists, axis=1).astype(np.int8),
        "SM": lambda: lists.sum(axis=1) % _DIGITS,
    }[operator]()
    return tuple(lists[values == value] for value in range(_DIGITS))


def solve(text: str) -> int:
    """The value of an expression.

    Raises:
        DataError: it is none; names the token.
    """
    stack: list[tuple[str, list[int]]] = [("", [])]  # open lists: operator and values so far
    for number, token in enumerate(text.split(" "), start=1):
        if token.startswith("[") and token[1:] in OPERATORS:
            stack.append((token[1:], []))
        elif len(token) == 1 and token in "0123456789":
            stack[-1][1].append(int(token))
        elif token == "]" and len(stack) > 1 and stack[-1][1]:
            operator, values = stack.pop()
            stack[-1][1].append(_apply(operator, sorted(values)))
        else:
            raise DataError(f"{text[:60]!r} is no ListOps expression: token {number} is {token!r}.")
    if len(stack) != 1 or len(stack[0][1]) != 1:
        raise DataError(f"{text[:60]!r} is no ListOps expression: it does not end in one value.")
    return stack[0][1][0]


def _apply(operator: str, ordered: list[int]) -> int:
    if operator == "SM":
        return sum(ordered) % _DIGITS
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return {"MAX": ordered[-1], "MIN": ordered[0], "MED": (low + high) // 2}[operator]
