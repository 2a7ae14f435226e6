"""Every task from rows to scores: it learns, and any mesh gives the same loss and the same evaluation."""

import jax
import numpy as np
import pytest

from moe import programs, setup
from moe.cli import complete_config
from moe.config import default_config
from moe.data.example_data import example_data
from moe.model.build import model_size
from moe.training.state import initialize
from tests.data import tiny_examples as tiny

PAIRS = {
    split: [(f"{word} {i}", f"{word[::-1]} {i}") for i in range(8) for word in ("abc", "defg")]
    for split in ("train", "valid", "test")
}
MESHES = ({"data": 8}, {"data": 2, "expert": 2, "tensor": 2})
TASKS = {
    "seq2seq": (lambda: tiny.pairs(PAIRS), {"sequence_length": 24, "prefix": True}),
    "classify": (tiny.pictures, {"sequence_length": 4, "patch": 4}),
    "ctc": (tiny.sounds, {"sequence_length": 8, "mels": 8, "tokenizer": "characters"}),
    "match": (lambda: tiny.pictures(), {"sequence_length": 12, "patch": 4}),
}


def config_of(task, length, mesh):
    config = default_config()
    config.task.name = task
    config.model.update({"num_layers": 1, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8})
    config.model.update({"num_experts": 4, "expert_width": 8})
    config.data.update({"batch_size": 8, "sequence_length": length})
    config.mesh.update({"data": 1} | mesh)
    config.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 1})
    return complete_config(config)


def outcome(task, root, mesh, steps=2):
    """Losses of a few steps, and the record and rows of an evaluation of `test`."""
    make, how = TASKS[task]
    data = example_data(make(), task=task, root=root, batch_size=8, seed=0, **how)
    run = setup.set_up(config_of(task, how["sequence_length"], mesh), data=data)
    with jax.set_mesh(run.mesh):
        state = jax.jit(
            lambda key: initialize(run.spec, run.transformation, key), out_shardings=run.shardings
        )(setup.root_key(0, 0))
        step, put, losses = programs.jit_train_step(run), setup.to_device(run.mesh), []
        batch = put(next(data.train_batches()))
        for _ in range(steps):
            state, told = step(state, batch, setup.root_key(0, 1), programs.hyper(run))
            losses.append(float(told.losses["cross_entropy"]))
        record, evaluation = setup.evaluate_split(
            run,
            programs.jit_eval_step(run),
            state.params,
            state.router,
            split="test",
            step=steps,
            size=model_size(run.spec, how["sequence_length"]),
        )
    return losses, record, evaluation.examples


@pytest.fixture(autouse=True)
def many_rows(monkeypatch):
    """Eight rows a split, so that one batch of eight is filled."""
    monkeypatch.setattr(tiny, "COUNT", 9)


@pytest.mark.parametrize(
    "task",
    [pytest.param(t, marks=pytest.mark.slow) if t in ("classify", "ctc") else t for t in TASKS],
)
def test_any_mesh_gives_the_same(task, tmp_path):
    one, two = (outcome(task, tmp_path, mesh) for mesh in MESHES)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
    assert one[0][1] < one[0][0]
    rows = one[2]
    np.testing.assert_array_equal(np.sort(rows.index), np.arange(len(rows.index)))
    assert len(rows.index) == (16 if task == "seq2seq" else 9)  # the last batch is not full
    for name, value in rows._asdict().items():
        if value is not None:
            other = getattr(two[2], name)
            np.testing.assert_allclose(other, value, rtol=1e-4, atol=1e-5, err_msg=name)
    mean = rows.nll.sum() / rows.count.sum()
    assert one[1]["metrics"]["loss/cross_entropy"] == pytest.approx(mean, rel=1e-5)
