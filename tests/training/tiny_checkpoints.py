"""Small states, and directories of checkpoints of them, to be damaged."""

from collections.abc import Sequence
from pathlib import Path
import shutil
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

from moe.training.checkpoint import Checkpointer

DATA = {"next_index": 7, "mixture": [1, None]}
META = {"config": {"model": {"width": 8}}, "tokenizer": "x" * 1000}
GOLDEN = Path(__file__).parent / "golden_checkpoint"


def sharding(devices: int, *spec: str | None) -> NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(devices), ("fsdp",))
    return NamedSharding(mesh, PartitionSpec(*spec))


def make_state(devices: int = 8, seed: int = 0) -> dict:
    """Every kind of leaf that a training state holds."""
    kernel = jax.random.normal(jax.random.key(seed), (16, 24))
    params = {"experts": {"up": kernel}, "scale": jnp.ones(24, jnp.bfloat16)}
    state = {
        "params": params,
        "optimizer": optax.adam(1e-3).init(params),
        "router_state": {"bias": jnp.arange(8, dtype=jnp.float32)},
        "key": jax.random.key(seed + 1),
        "step": jnp.int32(3),
    }
    return jax.device_put(state, target_shardings(state, devices))


def target_shardings(state: dict, devices: int) -> dict:
    rows = sharding(devices, "fsdp")
    whole = sharding(devices)
    return jax.tree.map(lambda x: rows if x.shape == (16, 24) else whole, state)


def abstract(state: dict, devices: int = 8) -> dict:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        target_shardings(state, devices),
    )


def assert_same_bits(expected: Any, actual: Any) -> None:
    assert jax.tree.structure(expected) == jax.tree.structure(actual)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def small_state(seed: int) -> dict:
    """16 kB on one device: few files, so that each of them can be damaged in turn."""
    return {
        "params": {"w": jax.random.normal(jax.random.key(seed), (64, 64))},
        "key": jax.random.key(seed),
    }


def save_steps(directory: Path, steps: Sequence[int], **options: Any) -> None:
    """`small_state(step)` at each step, all of them kept."""
    with Checkpointer(directory, keep_latest=len(steps), **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, small_state(step), {"next_index": step}, META)


def restore_small(directory: Path, **options: Any):
    """The newest step that is good, on one device."""
    target = abstract(small_state(0), devices=1)
    with Checkpointer(directory, **options) as checkpoints:
        return checkpoints.restore_newest(target, fresh={})


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_byte(path: Path, index: int, bit: int = 0) -> None:
    contents = bytearray(path.read_bytes())
    contents[index] ^= 1 << bit
    path.write_bytes(contents)


def copy_step(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
