"""The pages in docs/ that speak of code agree with it."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import routers
from moe.cli import load_config
from moe.errors import ConfigError
from moe.routing.table import ROUTERS, check_router
from scripts import document_routers
from tests.routing import test_bad_options as bad
from tests.routing.cases import Case
from tests.test_presets import step_shapes

DOCS = document_routers.PAGE.parent
ADDING = (DOCS / "adding_a_router.md").read_text()


def test_page_of_routers_is_what_the_code_says():
    """`python3 scripts/document_routers.py` writes it anew."""
    assert document_routers.PAGE.read_text() == document_routers.page()


def test_page_of_routers_is_complete():
    page = document_routers.page()
    grouped = [name for _, names in document_routers.groups() for name in names]
    assert grouped == list(ROUTERS)
    for name, router in ROUTERS.items():
        section = page.split(f"\n### {name}\n")[1].split("\n### ")[0]
        for said in (router.paper, router.equation, router.cost, router.use, router.causality):
            assert said in section
        table = section.split("| option | default | |\n")[-1]
        told = dict(re.findall(r"^\| `(\w+)` \| `.*` \| (.*)\|$", table, re.MULTILINE))
        assert list(told) == list(router.options)
        assert [option for option, text in told.items() if not text.strip()] == []


def test_links_of_the_pages_lead_somewhere():
    for path in DOCS.glob("*.md"):
        named = r"`((?:moe|tests|configs|scripts|docs)/[\w/.]+\.(?:py|md))`"
        for target in re.findall(named, path.read_text()):
            new = target.endswith(("/nearest.py", "/test_nearest.py"))  # what the reader will write
            assert new or (DOCS.parent / target).exists(), f"{path.name}: {target}"


def code(pattern: str) -> str:
    """The part of the page on adding a router that a pattern finds."""
    found = re.search(pattern, ADDING, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture
def nearest(monkeypatch) -> types.ModuleType:
    """The worked example, run and put into the table as the page says."""
    module = types.ModuleType("nearest")
    exec(code(r"^```python\n(.*?)^```$"), module.__dict__)
    row = code(r'^    ("nearest": nearest\.ROUTER),$')
    for name, router in eval("{" + row + "}", {"nearest": module}).items():
        monkeypatch.setitem(ROUTERS, name, router)
    return module


def test_example_is_short():
    assert code(r"^```python\n(.*?)^```$").count("\n") <= 40


def test_example_checks_and_routes(nearest):
    check_router("nearest", 8, k=2, softness=0.5)
    wrong = eval(code(r'^    (\("nearest", 2, \{"softness": 0\.0\}, .*?\)),$'))
    bad.test_impossible_combination_is_refused(*wrong)
    with pytest.raises(ConfigError, match=r"softnes is not an option.*'softness'"):
        check_router("nearest", 8, k=2, softnes=0.5)

    case = eval(code(r'^    (Case\("nearest".*?\)),$'), {"Case": Case})
    logits = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    valid = np.arange(6) < np.array([[6], [4]])
    routing = case.route(logits, valid)
    p = np.exp(logits / 0.5)
    p /= p.sum(axis=-1, keepdims=True)
    best = np.argsort(-p, axis=-1)[..., :2]
    np.testing.assert_array_equal(routing.plan.expert[valid], best[valid])
    gate = np.take_along_axis(p, best, axis=-1) * valid[..., None]
    np.testing.assert_allclose(routing.plan.gate, gate, rtol=1e-5)
    np.testing.assert_array_equal(routing.plan.valid, np.broadcast_to(valid[..., None], best.shape))


def test_example_gate_measures_distance(nearest):
    gate = nearest.CentreGate(5, 4, rngs=nearest.nnx.Rngs(params=0))
    x = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    distance = ((x[..., None] - np.asarray(gate.mu[...])) ** 2).sum(axis=2)  # [B S E]
    logits = gate(jnp.asarray(x)).logits
    np.testing.assert_allclose(logits - (x**2).sum(axis=-1, keepdims=True), -distance, rtol=1e-4)


def test_example_trains(nearest, monkeypatch):
    names = {"common": routers.common}
    exec(re.sub(r"^    ", "", code(r"^(    def nearest.*?)\n\n"), flags=re.MULTILINE), names)
    sections = names["nearest"](routers.Size())
    config = load_config("configs/quickstart.py", [("router.name", "nearest")])
    assert config.router.to_dict() == sections["router"]
    (after, told), before = step_shapes(config)
    assert jax.tree.structure(after.params) == jax.tree.structure(before.params)
    assert "balance" in told.losses
