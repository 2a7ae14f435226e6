"""`train.py` with faults: `python3 tests/faults/child.py inf_grad@9 sleep@7:60 -- --config=... --workdir=...`.

A fault is `kind@step`, `kind@first-last`, with `:value` where it takes one. Nothing of the program
knows of this: functions that `train` calls are wrapped before it starts. `SAVING n` is printed when the
save of step n begins. With `tell` a process says what its runs on other devices must have in common:
`ROWS n i:checksum ...` of the rows of step n that are on its devices, `STATE saved n checksum` and
`STATE loaded n checksum` of all numbers.
"""

from collections.abc import Callable
import hashlib
import math
import sys
import time
from typing import Any, NamedTuple
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from moe import cli, programs, setup
from moe.data.batches import RowData
import train


class Fault(NamedTuple):
    kind: str
    first: int
    last: int
    value: float

    def at(self, step: int) -> bool:
        return self.first <= step <= self.last


def parse(text: str) -> Fault:
    kind, _, rest = text.partition("@")
    steps, _, value = (rest or "0").partition(":")
    first, _, last = steps.partition("-")
    return Fault(kind, int(first), int(last or first), float(value or 0))


def bad_weight(value: float) -> Callable[[tuple], tuple]:
    """A loss with this weight: the loss or its gradient is not finite."""

    def change(arguments: tuple) -> tuple:
        *rest, hyper = arguments
        return *rest, hyper._replace(losses={**hyper.losses, "z": np.float32(value)})

    return change


def spiked(arguments: tuple) -> tuple:
    """Targets that nothing predicts."""
    state, batch, *rest = arguments
    targets = jax.device_put((batch.targets + 101) % 256, batch.targets.sharding)
    return state, batch._replace(targets=targets), *rest


CHANGES = {"nan_loss": bad_weight(math.nan), "inf_grad": bad_weight(1e37), "spike": spiked}
RAN = {"step": 0}  # the step that runs


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def wrap_step(faults: list[Fault]) -> None:
    compile_step = programs.compile_train_step

    def compiled(run: Any, state: Any) -> Any:
        for fault in (one for one in faults if one.kind == "slow_compile"):
            tell("COMPILING")
            # So long without one Python byte code, as in a compiler.
            hashlib.pbkdf2_hmac("sha256", b"", b"", int(2e6 * fault.value))
        step_of = compile_step(run, state)

        def step(*arguments: Any) -> Any:
            number = RAN["step"] = int(arguments[0].step) + 1
            for fault in (one for one in faults if one.at(number)):
                disturb(fault, number)
                arguments = CHANGES.get(fault.kind, unchanged)(arguments)
            return step_of(*arguments)

        return step

    programs.compile_train_step = compiled


def disturb(fault: Fault, step: int) -> None:
    if fault.kind in ("sleep", "slow_step"):
        time.sleep(fault.value)
    if fault.kind == "raise":
        raise RuntimeError(f"raised on purpose at step {step}")
    if fault.kind == "no_memory":
        raise MemoryError(f"no memory on purpose at step {step}")


def unchanged(arguments: tuple) -> tuple:
    return arguments


def wrap_evaluation(faults: list[Fault]) -> None:
    compile_step = programs.compile_eval_step

    def compiled(*arguments: Any) -> Any:
        step_of = compile_step(*arguments)

        def step(*given: Any) -> Any:
            tell("EVALUATING")
            for fault in faults:
                if fault.kind == "slow_eval" and fault.at(RAN["step"]):
                    time.sleep(fault.value)
            return step_of(*given)

        return step

    programs.compile_eval_step = compiled


def wrap_data(faults: list[Fault]) -> None:
    """The batch of a step never comes, or has wrong targets, whenever it is read."""
    make = RowData.train_batches
    hangs = [fault for fault in faults if fault.kind == "hang_data"]
    wrong = [fault for fault in faults if fault.kind == "wrong_targets"]

    def train_batches(self: RowData, *arguments: Any, **named: Any) -> Any:
        batches = make(self, *arguments, **named)
        given = type(batches).__next__
        rows = self.batch_size

        def hand_out(self: Any) -> Any:
            number = self.get_state()["next_row"] // rows + 1
            if any(fault.at(number) for fault in hangs):
                tell("WAITING")
                time.sleep(10_000)
            batch = given(self)
            if any(fault.at(number) for fault in wrong):
                return batch._replace(targets=(batch.targets + 101) % 256)
            return batch

        type(batches).__next__ = hand_out
        return batches

    RowData.train_batches = train_batches


def wrap_clock(faults: list[Fault]) -> None:
    """The clock on the wall jumps by so many seconds."""
    for name, unit in (("time", 1), ("time_ns", 10**9)):
        true = getattr(time, name)

        def jumped(true: Any = true, unit: int = unit) -> Any:
            jump = sum(fault.value for fault in faults if fault.at(RAN["step"]))
            return true() + type(true())(jump * unit)

        setattr(time, name, jumped)


def wrap_set_up(faults: list[Fault]) -> None:
    set_up = setup.set_up

    def slow(*arguments: Any, **named: Any) -> Any:
        for fault in (one for one in faults if one.kind == "slow_set_up"):
            tell("SETTING UP")
            time.sleep(fault.value)
        return set_up(*arguments, **named)

    setup.set_up = slow


def wrap_save() -> None:
    save = train.save

    def announced(session: Any, step: int, *rest: Any, **named: Any) -> Any:
        tell(f"SAVING {step}")
        return save(session, step, *rest, **named)

    train.save = announced


def wrap_telling() -> None:
    compile_step, restore, save = programs.compile_train_step, train.restore_or_start, train.save

    def compiled(run: Any, state: Any) -> Any:
        step_of = compile_step(run, state)

        def step(state: Any, batch: Any, *rest: Any) -> Any:
            tell(f"ROWS {int(state.step) + 1} {rows_here(batch)}")
            return step_of(state, batch, *rest)

        return step

    def restored(*arguments: Any) -> Any:
        place, changes = restore(*arguments)
        tell(f"STATE loaded {place.step} {checksum(place.state)}")
        return place, changes

    def saving(session: Any, step: int, state: Any, *rest: Any, **named: Any) -> Any:
        tell(f"STATE saved {step} {checksum(state)}")
        return save(session, step, state, *rest, **named)

    programs.compile_train_step, train.restore_or_start, train.save = compiled, restored, saving


def rows_here(batch: Any) -> str:
    """The rows on devices of this process, by their number in the batch of all."""
    found = {}
    shards = (batch.tokens.addressable_shards, batch.targets.addressable_shards)
    for tokens, targets in zip(*shards, strict=True):
        first = tokens.index[0].start or 0
        rows = zip(np.asarray(tokens.data), np.asarray(targets.data), strict=True)
        for number, row in enumerate(rows, start=first):
            found[number] = zlib.crc32(b"".join(part.tobytes() for part in row))
    return " ".join(f"{number}:{found[number]:08x}" for number in sorted(found))


def checksum(state: Any) -> str:
    """Of every bit of every array, wherever its parts are."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(state):  # one after another: each is a program of all processes
        whole = (
            leaf
            if leaf.is_fully_addressable
            else multihost_utils.process_allgather(leaf, tiled=True)
        )
        total.update(np.asarray(whole).tobytes())
    return total.hexdigest()[:16]


def main() -> None:
    cut = sys.argv.index("--")
    faults = [parse(text) for text in sys.argv[1:cut]]
    sys.argv = ["train.py", *sys.argv[cut + 1 :]]
    wrap_set_up(faults)
    wrap_step(faults)
    wrap_evaluation(faults)
    kinds = {fault.kind for fault in faults}
    if "tell" in kinds:
        wrap_telling()
    wrap_save()
    if kinds & {"hang_data", "wrong_targets"}:
        wrap_data(faults)
    if "clock" in kinds:
        wrap_clock([fault for fault in faults if fault.kind == "clock"])
    cli.run(train.main)


if __name__ == "__main__":
    main()
