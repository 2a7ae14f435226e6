"""Overrides, unknown keys, types and ranges; every file in configs/ against its golden text."""

import jax
import pytest

from moe.cli import complete_config, load_config
from moe.config import ConfigDict, default_config, dotted_keys
from moe.errors import ConfigError
from moe.model.build import model_spec
from moe.training.optimizer import adam
from moe.training.state import initialize
from tests import tiny
from tests.golden import renew


def get(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "7", 7),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("model.tie_embeddings", "true", True),
        ("model.tie_embeddings", "False", False),
        ("model.pattern", "dense,sparse", ("dense", "sparse")),
        ("model.pattern", "('dense', 'sparse')", ("dense", "sparse")),
        ("model.pattern", "dense", ("dense",)),
        ("model.logit_softcap", "30", 30.0),
        ("model.logit_softcap", "none", None),
        ("dispatch.capacity_factor", "None", None),
        ("dispatch.eval_capacity_factor", "1.5", 1.5),
        ("data.directory", "null", None),
        ("data.directory", "123", "123"),
        ("data.files", "texts/*.txt", "texts/*.txt"),
        ("data.vocab_size", "4096", 4096),
        ("data.name", "tfds:lm1b", "tfds:lm1b"),
        ("mesh.data", "-1", -1),
        ("router.normalize", "none", "none"),
        ("evaluation.batches", "3", 3),
    ],
)
def test_override_keeps_the_type(key, text, value):
    found = get(tiny.config(f"{key}={text}"), key)
    assert found == value
    assert type(found) is type(value)


def test_override_of_a_mapping():
    config = tiny.config("data.files={'code': '*.py.txt', 'prose': '*.txt'}", "data.files.prose=b")
    assert config.data.files.to_dict() == {"code": "*.py.txt", "prose": "b"}
    assert tiny.config("data.files={'code': 'a'}", "data.files=*.txt").data.files == "*.txt"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_expert=4", ["model.num_expert", "model.num_experts"]),
        ("router.normalise=none", ["router.normalise", "router.normalize"]),
        ("stepz=4", ["stepz", "'steps'"]),
        ("model=4", ["'model'", "the nearest is"]),
        ("steps.x=4", ["steps.x"]),
        ("steps=4.5", ["steps", "4.5", "int", "float"]),
        ("steps=true", ["steps", "bool"]),
        ("steps=none", ["steps", "NoneType"]),
        ("model.pattern=none", ["model.pattern", "tuple"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "'fast'", "float"]),
        ("model.tie_embeddings=1", ["model.tie_embeddings", "bool"]),
        ("model.logit_softcap=high", ["model.logit_softcap", "float or None"]),
        ("evaluation.batches=1.5", ["evaluation.batches", "int or None"]),
        ("router.k=2.0", ["router.k", "int"]),
        ("steps=0", ["steps=0", "greater than 0"]),
        ("evaluation.batches=0", ["evaluation.batches=0", "greater than 0"]),
        ("dispatch.capacity_factor=-1", ["dispatch.capacity_factor=-1", "greater than 0"]),
        ("dispatch.name=sorted", ["dispatch.name='sorted'", "grouped"]),
        ("dispatch.priority=last", ["dispatch.priority='last'", "token_major"]),
        (
            "dispatch.name=capacity dispatch.priority=choice_major",
            ["choice_major", "allow_noncausal=True"],
        ),
        ("seed=-1", ["seed=-1", "negative"]),
        ("model.dropout=1.0", ["model.dropout=1.0", "less than 1"]),
        ("optimizer.b2=1.5", ["optimizer.b2=1.5", "less than 1"]),
        ("model.qk_norm=both", ["model.qk_norm='both'", "head"]),
        ("model.pattern=sparse,odd", ["model.pattern", "odd"]),
        ("model.pattern=dense,dense,sparse", ["model.num_layers=2", "pattern", "num_layers to 3"]),
        ("model.kv_heads=3", ["model.heads=4", "model.kv_heads=3", "divisors"]),
        ("model.head_dim=7", ["model.head_dim=7", "even"]),
        ("optimizer.accumulation=3", ["data.batch_size=16", "optimizer.accumulation=3"]),
        ("router.name=topp", ["router.name='topp'", "'top_p'"]),
    ],
)
def test_mistake_names_key_value_and_rule(override, words):
    with pytest.raises(ConfigError) as error:
        tiny.config(*override.split(" "))
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"depth": 4}}, ["model.depth"]),
        ({"router": {"name": "topk", "temperature": 1.0}}, ["router.temperature", "topk"]),
        ({"router": {"name": "topk", "k": 2.5}}, ["router.k", "int"]),
        ({"data": {"files": 5}}, ["data.files", "str or dict or None"]),
        ({"steps": None}, ["steps", "int"]),
    ],
)
def test_mistake_in_a_config_file(change, words):
    sections = default_config().to_dict()
    for key, value in change.items():
        sections[key] = sections[key] | value if isinstance(value, dict) else value
    with pytest.raises(ConfigError) as error:
        complete_config(ConfigDict(sections))
    assert [word for word in words if word not in str(error.value)] == []


def test_switching_the_router_keeps_k_and_takes_its_options():
    config = tiny.config("router.groups=4", "router.name=deepseek_v3", "router.groups_kept=2")
    assert config.router.to_dict() == {
        "name": "deepseek_v3",
        "k": 2,
        "jitter": 0.0,
        "groups": 4,
        "groups_kept": 2,
        "scale": 1.0,
        "bias_rate": 1e-3,
        "bias_centering": 0.0,
    }
    assert "normalize" in tiny.config().router
    assert tiny.config("router.name=topk", "router.normalize=none").router.normalize == "none"


def test_defaults_are_complete_and_survive_json():
    config = complete_config(default_config())
    again = complete_config(ConfigDict(config.to_dict() | {"model": _as_json(config.model)}))
    assert again.to_dict() == config.to_dict()
    assert set(dotted_keys(default_config())) <= set(dotted_keys(config))


def _as_json(section: ConfigDict) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}


@pytest.mark.parametrize("path", renew.config_files(), ids=lambda path: path.stem)
def test_config_file_resolves_and_has_a_shape(path):
    """A change that was meant: `python3 -m tests.golden.renew`."""
    assert renew.resolved(path) == (renew.HERE / f"{path.stem}.txt").read_text()
    config = load_config(str(path))
    o = config.optimizer
    transformation = adam(b1=o.b1, b2=o.b2, eps=o.eps)
    spec = model_spec(config, vocab_size=320)
    shapes = jax.eval_shape(lambda: initialize(spec, transformation, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes.params)) > 0


def test_every_golden_file_has_a_config():
    golden = {path.stem for path in renew.HERE.glob("*.txt")}
    assert golden == {path.stem for path in renew.config_files()}
