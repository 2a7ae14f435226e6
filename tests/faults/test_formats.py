"""Row of the matrix about checkpoints of older versions (26)."""

import shutil

import jax
import jax.numpy as jnp
import optax
import pytest

from moe.errors import CheckpointError
from moe.training.checkpoint import Checkpointer
from moe.training.step_folder import read_record
from tests.training.tiny_checkpoints import (
    DATA,
    GOLDEN,
    META,
    abstract,
    assert_same_bits,
    make_state,
    sharding,
)


def golden_state() -> dict:
    params = {
        "experts": {"up": jnp.arange(24, dtype=jnp.float32).reshape(4, 6) / 7},
        "scale": jnp.linspace(-1, 1, 6).astype(jnp.bfloat16),
    }
    return {
        "step": jnp.int32(30),
        "params": params,
        "router": {"bias": jnp.arange(4, dtype=jnp.float32) / 3},
        "optimizer": optax.adamw(1e-3).init(params),
        "key": jax.random.key(5),
    }


def guard() -> dict:
    return {"losses": jnp.zeros(5), "skipped": jnp.int32(0)}


def test_row_26_a_checkpoint_of_format_1_loads_with_fresh_guards(tmp_path):
    """Bit for bit as its writer made it; what the format lacks is filled in."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(GOLDEN, directory)
    record = read_record(directory / "30")
    assert record is not None
    assert record["format"] == 1
    target = abstract({**golden_state(), "guard": guard()}, devices=8)
    with Checkpointer(directory) as checkpoints:
        restored = checkpoints.restore_newest(target, fresh={"guard": guard()})
        assert restored is not None
        assert restored.step == 30
        assert restored.data_state == {"next_batch": 30, "batch_size": 8}
        assert restored.meta == {"config": {"model": {"width": 6}}, "tokenizer": "bytes"}
        assert_same_bits({**golden_state(), "guard": guard()}, restored.state)
        assert restored.state["guard"]["losses"].sharding == sharding(8)
        assert checkpoints.best_step() == 30
        with pytest.raises(CheckpointError, match="guard/losses is absent in the checkpoint"):
            checkpoints.restore(30, target)
        checkpoints.save(31, restored.state, DATA, META)
        again = checkpoints.restore_newest(target, fresh={})
        assert again is not None
        assert again.step == 31


def test_fresh_never_fills_in_for_a_format_that_has_the_entry(tmp_path):
    directory = tmp_path / "checkpoints"
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(1, make_state(), DATA, META)
        target = abstract({**make_state(), "guard": guard()})
        with pytest.raises(CheckpointError, match="guard/losses is absent in the checkpoint"):
            checkpoints.restore_newest(target, fresh={"guard": guard()})
