import pytest

from moe.errors import ConfigError
from moe.routing import deepseek_v3
from moe.routing.router import pick_options
from moe.routing.table import (
    ROUTERS,
    check_router,
    find_router,
    router_options,
)


def test_options_are_read_from_the_signatures():
    assert router_options("topk")["normalize"] == "renormalize"
    assert router_options("switch") == router_options("random") == {}
    assert router_options("hash") == {"kind": "random"}
    assert router_options("deepseek_v3") == {
        "groups": 1,
        "groups_kept": 1,
        "scale": 1.0,
        "bias_rate": 1e-3,
        "bias_centering": 0.0,
    }


def test_each_function_gets_its_own_options():
    options = router_options("deepseek_v3")
    assert set(pick_options(deepseek_v3.route, options)) == {"groups", "groups_kept", "scale"}
    assert set(pick_options(deepseek_v3.update_state, options)) == {"bias_rate", "bias_centering"}
    assert pick_options(deepseek_v3.init_state, options) == {}


@pytest.mark.parametrize("name", ROUTERS)
def test_rows_describe_themselves(name):
    router = ROUTERS[name]
    sources = ("arXiv", "github.com", "EMO", "Auer et al. 2002", "ERNIE 4.5", "no paper: ")
    assert any(source in router.paper for source in sources)
    assert router.equation
    assert router.cost
    assert router.use.endswith(".")
    assert router.causality in {"C0", "C1", "C2", "C3"}
    assert set(router.traced) <= set(router_options(name))
    assert set(pick_options(router.update_state, router_options(name))) <= set(router.traced)


def test_unknown_router_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'deepseekv3' is not a router.*'deepseek_v3'"):
        find_router("deepseekv3")
    with pytest.raises(ConfigError, match=r"'zzz' is not a router; there are switch, gshard"):
        find_router("zzz")


@pytest.mark.parametrize(
    ("name", "k", "options", "message"),
    [
        ("topk", 9, {}, r"router\.k=9 .* model\.num_experts=8"),
        ("random", 0, {}, r"router\.k=0 must be between 1"),
        ("topk", 2, {"normalise": "none"}, r"normalise is not an option.*'normalize'"),
        ("switch", 1, {"groups": 2}, r"groups is not an option.*takes no options"),
        ("topk", 1, {}, "no gradient"),
        ("deepseek_v3", 2, {"groups": 3}, r"divide model\.num_experts=8"),
        ("hash", 2, {"kind": "bigram"}, "kind='bigram'"),
        ("topk", 2, {"jitter": 1.0}, r"jitter=1\.0 must be at least 0 and below 1"),
        ("random", 2, {"jitter": 0.01}, "no gate"),
    ],
)
def test_options_that_cannot_work_are_refused(name, k, options, message):
    with pytest.raises(ConfigError, match=message):
        check_router(name, 8, k=k, **options)
