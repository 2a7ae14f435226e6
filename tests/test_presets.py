"""Every preset of configs/routers.py resolves, validates, and traces a whole training step."""

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import routers
from moe import programs, setup
from moe.cli import complete_config, load_config
from moe.config import ConfigDict, default_config, replace_section
from moe.data.types import Batch
from moe.errors import ConfigError
from moe.model.build import model_spec
from moe.parallel.mesh import make_mesh
from moe.parallel.rules import RULES
from moe.routing.loss_table import LOSSES
from moe.routing.table import ROUTERS
from moe.setup import Run
from moe.training import optimizer
from moe.training.state import TrainState, abstract_state, make_skeleton, state_shardings

VOCAB = 64


def quickstart(name: str) -> ConfigDict:
    return load_config(f"configs/quickstart.py:router={name}")


def step_shapes(config: ConfigDict) -> tuple[Any, TrainState]:
    """Shapes of what a training step returns; nothing is compiled or allocated."""
    mesh = make_mesh(devices=jax.devices()[:1])
    spec = model_spec(config, VOCAB, np.arange(VOCAB))
    skeleton = make_skeleton(spec)
    transformation = optimizer.adam(b1=0.9, b2=0.95, eps=1e-8)
    shardings = state_shardings(skeleton, transformation, mesh, RULES["separate"])
    no_data, token_bytes = cast(Any, None), jnp.ones(VOCAB, jnp.int32)
    run = Run(config, mesh, no_data, spec, skeleton, transformation, shardings, token_bytes)
    state = abstract_state(spec, transformation, shardings)
    batch: Batch = setup.abstract_batch(run)
    with jax.set_mesh(mesh):
        step = programs.jit_train_step(run)
        return jax.eval_shape(step, state, batch, jax.random.key(0), programs.hyper(run)), state


def test_every_router_has_a_preset_of_its_name():
    assert set(ROUTERS) <= set(routers.PRESETS)
    for name in ROUTERS:
        assert routers.get(name)["router"]["name"] == name


@pytest.mark.parametrize("name", routers.PRESETS)
def test_preset_cites_and_sets_every_loss(name):
    label = " ".join((routers.PRESETS[name].__doc__ or "").split())
    assert label.endswith(".")
    told = ("arXiv:", "Ours", "ours", "no paper", "As `", "github.com", "ERNIE", "repository")
    assert any(word in label for word in told)
    sections = routers.get(name)
    assert set(sections) == {"router", "losses"}
    assert set(LOSSES) <= set(sections["losses"]) <= set(default_config().losses)
    options = ROUTERS[sections["router"]["name"]].options
    assert set(sections["router"]) <= {"name", "k", "jitter"} | set(options)


def test_config_has_every_loss_with_its_options():
    told = dict(default_config().losses)
    expected = {}
    for name, loss in LOSSES.items():
        expected |= {name: told.get(name)}
        expected |= {f"{name}_{option}": value for option, value in loss.options.items()}
    assert told == expected
    weights = [type(told[name]) for name in LOSSES]
    assert weights == [float] * len(LOSSES)


@pytest.mark.parametrize("name", routers.PRESETS)
def test_preset_trains_at_equal_active_compute(name):
    plain, config = load_config("configs/quickstart.py"), quickstart(name)
    assert config.router.k * config.model.expert_width == 4 * 96
    for section in set(plain) - {"router", "losses", "model"}:
        assert config[section] == plain[section]
    (after, told), before = step_shapes(config)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, before)
    assert all(jax.tree.leaves(same))
    assert told.grad_norm.shape == ()
    learned = ROUTERS[config.router.name].learned
    for loss in (loss for loss in LOSSES if config.losses[loss] and learned):
        assert loss in told.losses


@pytest.mark.parametrize("name", routers.PRESETS)
@pytest.mark.parametrize("size", [(4, 2, 32), (36, 6, 288), (64, 8, 512), (256, 8, 1024)])
def test_preset_fits_other_sizes(name, size):
    config = default_config()
    config.model.update({"num_experts": size[0], "expert_width": 96})
    config.router.k = size[1]
    config.data.sequence_length = size[2]
    routers.apply(config, name)
    assert config.router.k * config.model.expert_width == 96 * size[1]
    model_spec(complete_config(config), VOCAB, np.arange(VOCAB))  # refuses what does not fit


def test_published_numbers():
    big = routers.Size(num_experts=256, k=8, sequence_length=4096)
    v3 = routers.get("deepseek_v3", big)
    assert v3["router"] == {
        **{"name": "deepseek_v3", "jitter": 0.0, "k": 8, "groups": 8, "groups_kept": 4},
        **{"scale": 2.5, "bias_rate": 1e-3},
    }
    assert (v3["losses"]["balance"], v3["losses"]["sequence_balance"]) == (0.0, 1e-4)
    v2 = routers.get("deepseek_v2", big._replace(num_experts=160, k=6))
    assert [v2["router"][n] for n in ("groups", "groups_kept", "scale")] == [8, 3, 16.0]
    assert routers.get("switch")["router"] == {"name": "switch", "jitter": 1e-2, "k": 1}
    assert routers.get("gshard")["losses"]["balance_counts"] == "first"
    moge = routers.get("balanced_groups", big._replace(num_experts=64, k=8))
    assert moge["router"]["groups"] == 8
    assert routers.get("soft_moe", big)["router"]["slots"] * 256 == 4096 * 8
    peer = routers.get("product_key", big._replace(num_experts=1024**2, k=128))
    assert peer["router"]["heads"] == 8


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"router='deepseek_v4' is no preset.*'deepseek_v3'"):
        load_config("configs/quickstart.py:router=deepseek_v4")


def test_width_that_cannot_be_shared():
    config = default_config()
    config.model.expert_width = 33
    replace_section(config, "router", {"name": "topk", "k": 3, "jitter": 0.0})
    with pytest.raises(
        ConfigError, match=r"router.k=3 x model.expert_width=33 is not divisible by 2"
    ):
        routers.apply(config, "gshard")


def test_config_loads_from_anywhere(tmp_path, monkeypatch):
    path = Path("configs/quickstart.py").resolve()
    monkeypatch.chdir(tmp_path)
    assert load_config(f"{path}:router=switch").router.jitter == 1e-2
    (tmp_path / "mine.py").write_text(path.read_text())
    with pytest.raises(ConfigError, match=r"routers\.py, which is no Python file"):
        load_config(str(tmp_path / "mine.py"))
