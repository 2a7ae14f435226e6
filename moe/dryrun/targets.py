"""What to compile for: a name such as `v5p:4x4x4`, `v5e-64`, `h100-8` or `cpu-8`, and its devices."""

import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from moe.config import nearest
from moe.dryrun.figures import FIGURES, Figures
from moe.errors import ConfigError

# Accelerator types by the number in their name -> shape of the slice. A number counts chips, but cores
# of v5p, which has two a chip (https://cloud.google.com/tpu/docs/v5p).
TPU_SHAPES = {
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v6e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {
        8: "2x2x1",
        16: "2x2x2",
        32: "2x2x4",
        64: "2x4x4",
        128: "4x4x4",
        256: "4x4x8",
        512: "4x8x8",
        1024: "8x8x8",
        2048: "8x8x16",
        4096: "8x16x16",
        8192: "16x16x16",
        12288: "16x16x24",
    },
}
EXAMPLES = (
    "v5p:4x4x4, v5p-128 (the same: 128 cores), v5e:16x16, v6e-256, 2*v5e:16x16, h100-8, cpu-8"
)


class Target(NamedTuple):
    """Devices to compile for."""

    name: str
    kind: str  # key of `FIGURES`, or cpu
    devices: list[jax.Device]
    slices: int
    figures: Figures | None  # None: nobody publishes a laptop's


def find_target(text: str) -> Target:
    """The devices that a name stands for; none of them needs to be there.

    Args:
        text: `KIND:AxB[xC]` or `KIND-COUNT`, with `N*` in front for `N` slices.

    Raises:
        ConfigError: no such kind or shape, or its compiler is not installed.
    """
    match = re.fullmatch(
        r"(?:(\d+)\*)?([a-z0-9]+?)(?:-(\d+)|:(\d+(?:x\d+){1,2}))", text.strip().lower()
    )
    if match is None:
        raise ConfigError(f"--topology={text!r} is not KIND:AxB or KIND-COUNT, such as {EXAMPLES}.")
    slices, kind, count, shape = match.groups()
    if "0" in (slices, count):
        raise ConfigError(
            f"--topology={text!r} names no device at all: write 1 or more, as {EXAMPLES}."
        )
    if kind in TPU_SHAPES:
        shape = shape or _shape_of(kind, int(count))
        return Target(
            text, kind, _tpu(kind, shape, int(slices or 1)), int(slices or 1), FIGURES[kind]
        )
    if shape is not None or slices is not None:
        raise ConfigError(f"--topology={text!r}: only TPUs have a shape and slices; {EXAMPLES}.")
    if kind == "cpu":
        return Target(text, kind, _cpu(int(count)), 1, None)
    if kind == "h100":
        from moe.dryrun.cuda_target import cuda_devices

        return Target(text, kind, cuda_devices(kind, int(count)), 1, FIGURES[kind])
    known = (*TPU_SHAPES, "h100", "cpu")
    raise ConfigError(
        f"--topology={text!r}: no device is called {kind!r}; {nearest(kind, known)}. Known are "
        f"{', '.join(known)}, as in {EXAMPLES}."
    )


def _shape_of(kind: str, count: int) -> str:
    shapes = TPU_SHAPES[kind]
    if count in shapes:
        return shapes[count]
    unit = "cores, two a chip" if kind == "v5p" else "chips"
    raise ConfigError(
        f"--topology={kind}-{count}: no slice of {kind} has {count} {unit}. There are "
        f"{', '.join(f'{kind}-{n} ({s})' for n, s in shapes.items())}; or name a shape, as {kind}:{shapes[16]}."
    )


def _tpu(kind: str, shape: str, slices: int) -> list[jax.Device]:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # and no chip for two processes to fight over
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **more
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"--topology={kind}:{shape} cannot be compiled for here: {_first_line(error)}. The compiler "
            "for TPUs is in the extra `tpu`: python3 -m pip install -e '.[tpu]' on Linux."
        ) from error
    devices = list(found.devices)
    expected = slices * math.prod(int(n) for n in shape.split("x"))
    assert len(devices) == expected, (shape, len(devices))
    return devices


def _cpu(count: int) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"--topology=cpu-{count}: this process has {len(devices)} CPU devices. Set "
            f"jax_num_cpu_devices={count} before JAX is first used."
        )
    return devices[:count]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
