"""From a config and devices that need not be there to the compiled training step."""

import re
import time
from typing import NamedTuple

import jax
from jax.errors import JaxRuntimeError

from moe import programs, setup
from moe.config import ConfigDict
from moe.data.tokenizers import byte_tokenizer
from moe.dryrun.targets import Target
from moe.errors import ConfigError
from moe.training.state import abstract_state


class Compiled(NamedTuple):
    """The compiled step, or why there is none."""

    run: setup.Run
    seconds: float  # of tracing and compiling
    text: str | None  # the optimised module
    memory: dict[str, int] | None  # bytes a device, as the compiler assigned them
    failure: str | None  # what the compiler said when the step did not fit


def vocabulary(config: ConfigDict) -> int:
    """Rows of the embedding, without any text.

    Raises:
        ConfigError: a learned vocabulary of unstated size.
    """
    if config.data.tokenizer == "bytes":
        return byte_tokenizer().vocab_size
    if config.data.vocab_size is None:
        raise ConfigError(
            f"data.vocab_size=None with data.tokenizer={config.data.tokenizer!r}: a dry run reads no text and "
            "must be told how many rows the embedding has. Set data.vocab_size."
        )
    return config.data.vocab_size


def plan(config: ConfigDict, target: Target) -> setup.Run:
    """Everything that a config decides on these devices; allocates nothing and reads no data.

    Raises:
        ConfigError: a combination that cannot work.
    """
    mesh = setup.mesh_of(config, target.devices)
    setup.check_layout(config, mesh)
    return setup.assemble(config, mesh, vocab_size=vocabulary(config))


def compile_step(run: setup.Run) -> Compiled:
    """Compiles the training step of `train.py` for the devices of the mesh.

    A step that does not fit is no error: `failure` has the compiler's words.
    """
    started = time.perf_counter()
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(run.mesh):
        state = abstract_state(run.spec, run.transformation, run.shardings)
        step = programs.jit_train_step(run)
        lowered = step.lower(state, setup.abstract_batch(run), key, programs.hyper(run))
        try:
            executable = lowered.compile()
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(run, time.perf_counter() - started, None, None, str(error))
    seconds = time.perf_counter() - started
    stats = executable.memory_analysis()
    fields = ("argument", "output", "alias", "temp", "generated_code")
    memory = {name: int(getattr(stats, f"{name}_size_in_bytes")) for name in fields}
    return Compiled(run, seconds, executable.as_text(), memory, None)


def used_and_limit(failure: str) -> tuple[float, float] | None:
    """Bytes of main memory that the step wanted and that a device has, from the compiler's message.

    None where it names no sizes, or those of a small memory inside the chip.
    """
    match = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", failure)
    if match is None:
        return None
    units = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
    used, used_unit, limit, limit_unit = match.groups()
    return float(used) * units[used_unit], float(limit) * units[limit_unit]
