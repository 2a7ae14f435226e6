"""Every impossible combination of options is refused by name, with the value, the rule and the fix."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import setup
from moe.cli import load_config
from moe.errors import ConfigError
from moe.routing.router import pick_inputs
from moe.routing.table import ROUTERS, check_causal, check_router
from moe.routing.types import Routing

E, S, B = 8, 16, 4  # experts, positions, rows, unless a row says otherwise

# Options that name one of several ways, with a value that none of them has.
UNKNOWN = [
    ("balanced_groups", "normalize"),
    ("bernoulli", "baseline"),
    ("bernoulli", "gates"),
    ("cosine", "score"),
    ("document_pool", "normalize"),
    ("document_pool_whole", "normalize"),
    ("dselect_k", "selector"),
    ("expert_attention", "normalize"),
    ("expert_attention", "score"),
    ("expert_choice", "normalize"),
    ("gshard", "eval_policy"),
    ("gshard", "policy"),
    ("gumbel", "gates"),
    ("gumbel_sampled", "gates"),
    ("hash", "kind"),
    ("modality_pools", "normalize"),
    ("noisy_topk", "init"),
    ("noisy_topk", "load_threshold"),
    ("noisy_topk", "noise"),
    ("noisy_topk", "normalize"),
    ("noisy_weights", "noise_mode"),
    ("noisy_weights", "normalize"),
    ("noisy_weights", "score"),
    ("position", "kind"),
    ("position_weighted", "kind"),
    ("prior", "normalize"),
    ("quantile", "price"),
    ("quantile", "score"),
    ("query_key", "normalize"),
    ("query_key", "score"),
    ("random_path", "eval_mode"),
    ("random_path", "gradient"),
    ("random_path", "scope"),
    ("random_path_sampled", "eval_mode"),
    ("random_path_sampled", "gradient"),
    ("random_path_sampled", "scope"),
    ("recurrent", "normalize"),
    ("recurrent", "score"),
    ("reinforce", "baseline"),
    ("reinforce", "gates"),
    ("residual", "normalize"),
    ("residual", "score"),
    ("segment", "mode"),
    ("segment", "normalize"),
    ("segment", "pool"),
    ("segment", "score"),
    ("segment_self", "normalize"),
    ("segment_self", "pool"),
    ("segment_self", "score"),
    ("thor", "eval_mode"),
    ("thor", "scope"),
    ("topk", "normalize"),
    ("topk", "score"),
    ("two_level", "group_score"),
    ("two_level", "norm"),
    ("two_level", "variant"),
]

# Router, k, options (E, S, B among them are the sizes), and what the message must hold.
IMPOSSIBLE = [
    # One expert whose gate would always be 1.
    ("topk", 1, {}, "router.k=1 router.normalize='renormalize' normalize='none'"),
    ("topk", 1, {"normalize": "topk_softmax"}, "router.k=1 'topk_softmax'"),
    ("prior", 1, {}, "router.k=1 normalize='none'"),
    ("query_key", 1, {}, "router.k=1 normalize='none'"),
    ("expert_attention", 1, {}, "router.k=1 normalize='none'"),
    ("residual", 1, {}, "router.k=1 normalize='none'"),
    ("recurrent", 1, {}, "router.k=1 normalize='none'"),
    ("noisy_weights", 1, {}, "router.k=1 normalize='none'"),
    ("segment", 1, {}, "router.k=1 normalize='none'"),
    ("segment_self", 1, {}, "router.k=1 normalize='none'"),
    ("document_pool", 1, {}, "router.k=1 normalize='none'"),
    ("document_pool_whole", 1, {}, "router.k=1 normalize='none'"),
    ("modality_pools", 1, {}, "router.k=1 normalize='none'"),
    ("noisy_topk", 1, {}, "router.k=1 'topk_softmax' normalize='none'"),
    ("gumbel", 1, {"gates": "renormalize"}, "router.k=1 'renormalize' 'importance'"),
    (
        "balanced_groups",
        1,
        {"groups": 1, "normalize": "renormalize"},
        "router.k=1 normalize='none'",
    ),
    ("two_level", 2, {"groups_kept": 2, "norm": "level"}, "norm='level' router.k=2 norm='none'"),
    ("two_level", 2, {"groups_kept": 1}, "groups_kept=1 norm='none'"),
    ("two_level", 1, {"groups_kept": 1, "group_score": "max"}, "router.k=1 norm='none'"),
    # Options that do not go together.
    (
        *("topk", 2, {"score": "sqrt_softplus", "normalize": "topk_softmax"}),
        "'topk_softmax' 'sqrt_softplus' normalize='renormalize'",
    ),
    ("two_level", 2, {"variant": "limited", "norm": "level"}, "norm='level' 'limited' 'joint'"),
    ("noisy_topk", 2, {"noise_std": 0.0}, "noise_std=0.0 init='normal'"),
    # A fixed number of experts.
    ("switch", 2, {}, "router.k=2 exactly one router.k=1"),
    ("base", 2, {}, "router.k=2 exactly one router.k=1"),
    ("reinforce", 2, {}, "router.k=2 exactly one router.k=1"),
    ("gshard", 1, {}, "router.k=1 two router.k=2"),
    ("gshard", 3, {}, "router.k=3 two router.k=2"),
    ("random_path", 2, {"paths": 3}, "paths=3 router.k=2 router.paths=2"),
    ("random_path_sampled", 3, {}, "paths=2 router.k=3 router.paths=3"),
    ("two_level", 2, {"variant": "soft"}, "router.k=2 'soft' router.k=8"),
    # More experts than there are, or than can be told apart.
    ("noisy_topk", 8, {}, "router.k=8 model.num_experts=8 below"),
    ("quantile", 8, {}, "router.k=8 model.num_experts=8 below"),
    ("gumbel", 8, {}, "router.k=8 model.num_experts=8 'raw'"),
    ("gumbel_sampled", 8, {}, "router.k=8 model.num_experts=8 'raw'"),
    # Groups.
    *(
        row
        for name in ("deepseek_v2", "deepseek_v3")
        for row in (
            (name, 2, {"groups": 3}, "groups=3 divide model.num_experts=8"),
            (name, 2, {"groups": 0}, "groups=0 at least 1"),
            (name, 2, {"groups": 4, "groups_kept": 5}, "groups_kept=5 router.groups=4"),
            (name, 2, {"groups": 4, "groups_kept": 0}, "groups_kept=0 router.groups=4"),
            (name, 3, {"groups": 4, "groups_kept": 1}, "groups_kept=1 router.k=3 at least 2"),
        )
    ),
    ("two_level", 2, {"groups": 3}, "groups=3 divide model.num_experts=8"),
    ("two_level", 2, {"groups": 0}, "groups=0 at least 1"),
    ("two_level", 2, {"groups_kept": 5}, "groups_kept=5 router.groups=4"),
    ("two_level", 6, {"groups_kept": 2}, "groups_kept=2 router.k=6 at least 3"),
    ("two_level", 3, {"groups_kept": 2}, "router.k=3 groups_kept=2 'limited'"),
    ("balanced_groups", 2, {"groups": 3}, "groups=3 divide model.num_experts=8"),
    ("balanced_groups", 2, {"groups": 0}, "groups=0 at least 1"),
    ("balanced_groups", 3, {"groups": 2}, "router.k=3 multiple router.groups=2"),
    # Grids and heads.
    ("product_key", 4, {}, "model.num_experts=8 square 4 9"),
    ("product_key", 4, {"E": 9, "heads": 3}, "heads=3 divide router.k=4"),
    ("product_key", 4, {"E": 9, "heads": 0}, "heads=0 at least 1"),
    ("product_key", 2, {"E": 9, "heads": 2}, "router.k=2 heads=2 router.k=4"),
    ("product_key", 1, {"E": 9}, "router.k=1 heads=1 router.k=2"),
    ("product_key", 2, {"E": 9, "key_dim": 5}, "key_dim=5 even"),
    ("product_key", 2, {"E": 9, "key_dim": -2}, "key_dim=-2 not negative"),
    ("query_key", 2, {"heads": 0}, "heads=0 at least 1"),
    ("query_key", 2, {"key_dim": -1}, "key_dim=-1 not negative"),
    ("cosine", 2, {"dim": -1}, "dim=-1 not be negative"),
    ("cosine", 2, {"tau0": -0.1}, "tau0=-0.1 not be negative"),
    ("recurrent", 2, {"memory_width": 0}, "memory_width=0 at least 1"),
    ("reinforce", 1, {"baseline_hidden": -1}, "baseline_hidden=-1 not be negative"),
    ("bernoulli", 1, {"baseline_hidden": -1}, "baseline_hidden=-1 not be negative"),
    # Bounds on variable numbers of experts.
    *(
        row
        for name in ("top_p", "dynmoe", "relu", "bernoulli", "expert_choice")
        for row in (
            (name, 2, {"k_max": 9}, "k_max=9 model.num_experts=8"),
            (name, 2, {"k_max": -1}, "k_max=-1 model.num_experts=8"),
        )
    ),
    ("relu", 3, {"k_max": 2}, "k_max=2 router.k=3"),
    ("expert_choice", 3, {"k_max": 2}, "k_max=2 router.k=3"),
    ("expert_choice", 3, {"cap": 2}, "cap=2 router.k=3"),
    ("expert_choice", 3, {"cap": 9}, "cap=9 model.num_experts=8"),
    ("top_p", 2, {"mass": 0.0}, "mass=0.0 above 0"),
    ("top_p", 2, {"mass": 1.1}, "mass=1.1 at most 1"),
    ("smoe_dropout", 2, {"k_min": 3}, "k_min=3 router.k=2"),
    ("smoe_dropout", 2, {"k_min": 0}, "k_min=0 router.k=2"),
    ("smoe_dropout", 2, {"ramp_steps": 0}, "ramp_steps=0 at least 1"),
    ("gumbel", 2, {"greedy": 2}, "greedy=2 below router.k=2"),
    ("gumbel", 2, {"greedy": -1}, "greedy=-1 at least 0"),
    ("thor", 1, {"ensemble": 9}, "ensemble=9 model.num_experts=8"),
    ("thor", 1, {"ensemble": -1}, "ensemble=-1 between 0"),
    # Lengths, batches, pools.
    ("segment", 2, {"segment_size": 17}, "segment_size=17 data.sequence_length=16 at most 16"),
    ("segment", 2, {"segment_size": 0}, "segment_size=0 at least 1"),
    ("segment", 2, {"mode": "self"}, "mode='self' 'segment_self'"),
    ("segment_self", 2, {"segment_size": 17}, "segment_size=17 data.sequence_length=16"),
    ("document_pool", 2, {"segment_size": 17}, "segment_size=17 data.sequence_length=16"),
    ("document_pool", 2, {"pool_size": 1}, "pool_size=1 router.k=2"),
    ("document_pool", 2, {"pool_size": 9}, "pool_size=9 model.num_experts=8"),
    ("document_pool_whole", 2, {"pool_size": 1}, "pool_size=1 router.k=2"),
    ("document_pool_whole", 2, {"pool_size": 9}, "pool_size=9 model.num_experts=8"),
    ("lory", 1, {"segment": 5}, "segment=5 divide data.sequence_length=16"),
    ("lory", 1, {"segment": 0}, "segment=0 at least 1"),
    ("lory", 1, {"segment": 32}, "segment=32 divide data.sequence_length=16"),
    ("quantile", 2, {"E": 7, "B": 1}, "1 rows 16 positions router.k=2 32 model.num_experts=7"),
    ("position", 2, {"kind": "block"}, "length=0 'block' at least 16 data.sequence_length"),
    ("position", 2, {"kind": "block", "length": 12}, "length=12 at least 16"),
    ("position_weighted", 2, {"kind": "block", "length": 4}, "length=4 at least 16"),
    ("position", 2, {"length": -1}, "length=-1 not be negative"),
    ("bigram_hash", 2, {"buckets": 7}, "buckets=7 model.num_experts=8"),
    ("modality_pools", 2, {"modalities": 0}, "modalities=0 at least 1"),
    ("modality_pools", 2, {"pools": (4, 2, 2)}, "pools=(4, 2, 2) modalities=2"),
    ("modality_pools", 2, {"pools": (4, 3)}, "pools=(4, 3) model.num_experts=8 7"),
    ("modality_pools", 2, {"pools": (9, -1)}, "pools=(9, -1) at least 0"),
    ("modality_pools", 2, {"pools": (7, 1)}, "pools=(7, 1) router.k=2"),
    ("modality_pools", 2, {"pool_shared": 1}, "pool_shared=1 router.pools"),
    ("soft_moe", 1, {"slots": 0}, "slots=0 at least 1"),
    # Rates, shares, temperatures.
    ("smear", 1, {"dropout": 1.0}, "dropout=1.0 below 1"),
    ("smear", 1, {"dropout": -0.1}, "dropout=-0.1 at least 0"),
    ("gshard", 2, {"threshold": -0.1}, "threshold=-0.1 not be negative"),
    ("gshard", 2, {"policy": "threshold"}, "threshold=0.5 'threshold' 0.2"),
    ("noisy_topk", 2, {"noise_std": -1.0}, "noise_std=-1.0 not be negative"),
    ("noisy_weights", 2, {"noise_scale": -0.1}, "noise_scale=-0.1 at least 0"),
    ("relu", 2, {"lambda_init": 0.0}, "lambda_init=0.0 1e-8"),
    ("relu", 2, {"lambda_factor": 1.0}, "lambda_factor=1.0 above 1"),
    ("dselect_k", 2, {"step_width": 0.0}, "step_width=0.0 above 0"),
    ("base", 1, {"epsilon": 0.0}, "epsilon=0.0 between 0 and 1"),
    ("base", 1, {"rounds": 0}, "rounds=0 at least 1"),
    ("sinkhorn", 2, {"temperature": 0.0}, "temperature=0.0 above 0"),
    ("sinkhorn", 2, {"iterations": 0}, "iterations=0 at least 1"),
    ("expert_choice", 2, {"entropy": 0.0}, "entropy=0.0 above 0"),
    ("expert_choice", 2, {"iterations": 0}, "iterations=0 at least 1"),
    ("expert_choice", 2, {"decay": 1.0}, "decay=1.0 below 1"),
    ("reinforce", 1, {"baseline_decay": 1.0}, "baseline_decay=1.0 below 1"),
    ("bernoulli", 1, {"baseline_decay": -0.1}, "baseline_decay=-0.1 at least 0"),
    ("random_path", 2, {"baseline_decay": 1.5}, "baseline_decay=1.5 below 1"),
    ("random_path", 2, {"temperature": 0.0}, "temperature=0.0 above 0"),
    ("random_path", 2, {"prior_weight": -1.0}, "prior_weight=-1.0 at least 0"),
    ("prior", 2, {"prior_weight": -1.0}, "prior_weight=-1.0 at least 0"),
    ("gumbel", 2, {"tau": 0.0}, "tau=0.0 above 0"),
    ("gumbel", 2, {"tau_end": -1.0}, "tau_end=-1.0 above 0"),
    ("gumbel", 2, {"anneal_steps": 0}, "anneal_steps=0 above 0"),
    ("gumbel", 2, {"noise": -1.0}, "noise=-1.0 not be negative"),
    ("deepseek_v3", 2, {"bias_rate": -1e-3}, "bias_rate=-0.001 not be negative"),
    ("deepseek_v3", 2, {"bias_centering": 1.5}, "bias_centering=1.5 between 0 and 1"),
    *(
        (name, 2, {"scale": 0.0}, "scale=0.0 above 0")
        for name in ROUTERS
        if "scale" in ROUTERS[name].options
    ),
]


def _check(name: str, k: int, options: dict) -> None:
    options = dict(options)
    sizes = [options.pop(letter, size) for letter, size in (("E", E), ("S", S), ("B", B))]
    check_router(name, sizes[0], k=k, sequence_length=sizes[1], batch_size=sizes[2], **options)


def _possible(name: str) -> tuple[int, dict]:
    """A k and sizes with which the defaults of a router work."""
    ks = {"switch": 1, "base": 1, "reinforce": 1, "two_level": 4, "document_pool": 2}
    sizes = {"product_key": {"E": 9}, "lory": {"S": 64}}
    return ks.get(name, 2), sizes.get(name, {})


@pytest.mark.parametrize("name", ROUTERS)
def test_defaults_are_possible(name):
    _check(name, *_possible(name))


@pytest.mark.parametrize(("name", "option"), UNKNOWN)
def test_unknown_name_is_refused(name, option):
    k, options = _possible(name)
    with pytest.raises(ConfigError) as error:
        _check(name, k, {**options, option: "strange"})
    _is_told(error, f"router.{option}='strange'")
    assert str(ROUTERS[name].options[option]) in str(error.value), "the known names"


def test_every_option_that_is_a_name_is_tried():
    texts = {(n, o) for n, r in ROUTERS.items() for o, v in r.options.items() if isinstance(v, str)}
    assert texts == set(UNKNOWN)


@pytest.mark.parametrize(
    ("name", "k", "options", "words"),
    IMPOSSIBLE,
    ids=lambda value: str(value).replace(" ", "")[:40],
)
def test_impossible_combination_is_refused(name, k, options, words):
    with pytest.raises(ConfigError) as error:
        _check(name, k, options)
    _is_told(error, *re.findall(r"\S+\([^)]*\)|[^\s(]\S*", words))


def _is_told(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert [word for word in words if word not in message] == [], message


def test_every_router_with_a_rule_is_tried():
    """A router whose check can refuse something has a row; the others have no options to get wrong."""
    tried = {row[0] for row in IMPOSSIBLE} | {name for name, _ in UNKNOWN}
    untried = set(ROUTERS) - tried
    assert {name: ROUTERS[name].options for name in untried} == {"random": {}}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("k", [0, -1, 10])
def test_k_outside_the_experts(name, k):
    with pytest.raises(ConfigError) as error:
        check_router(name, 9, k=k)
    _is_told(error, f"router.k={k}", "model.num_experts=9", "Change")


@pytest.mark.parametrize("name", ROUTERS)
def test_numbers_that_are_not_finite(name):
    k, options = _possible(name)
    for option, value in ROUTERS[name].options.items():
        if isinstance(value, float):
            for bad in (float("nan"), float("inf")):
                with pytest.raises(ConfigError) as error:
                    _check(name, k, {**options, option: bad})
                _is_told(error, f"router.{option}={bad}", "finite")


@pytest.mark.parametrize("name", ROUTERS)
def test_jitter(name):
    k, options = _possible(name)
    for jitter in (1.0, -0.1):
        with pytest.raises(ConfigError, match=f"router.jitter={jitter} must be at least 0"):
            _check(name, k, {**options, "jitter": jitter})
    if not ROUTERS[name].learned:
        with pytest.raises(
            ConfigError, match=r"router.jitter=0.1 .* no gate .* Set router.jitter=0.0"
        ):
            _check(name, k, {**options, "jitter": 0.1})


@pytest.mark.parametrize("name", ROUTERS)
def test_unknown_option_names_the_nearest(name):
    k, options = _possible(name)
    known = ROUTERS[name].options
    wrong = (next(iter(known), "option")) + "x"
    with pytest.raises(ConfigError) as error:
        _check(name, k, {**options, wrong: 1})
    _is_told(error, f"router.{wrong}", repr(name), *known)


STATEFUL = [name for name, router in ROUTERS.items() if router.stateful]
# Without state they decide as with a fresh one; the others cannot decide at all.
FRESH = "deepseek_v3 quantile gumbel gumbel_sampled reinforce bernoulli random_path random_path_sampled prior"


@pytest.mark.parametrize("name", STATEFUL)
def test_stateful_router_without_its_state(name):
    key = jax.random.key(1)
    if name not in FRESH.split():
        with pytest.raises(ValueError, match=r"state"):
            _route(name, training=False, key=key)
        return
    make = ROUTERS[name].init_state
    facts = {"num_experts": 8, "vocab_size": 11, "k": 2, "key": key, "width": 6}
    fresh = make(**pick_inputs(make, facts))
    pair = [_route(name, training=False, key=key, state=state).plan for state in (None, fresh)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *pair)


@pytest.mark.parametrize("name", [n for n, router in ROUTERS.items() if router.needs_key_in_eval])
def test_evaluation_that_draws_without_a_key(name):
    with pytest.raises(ValueError, match="pass a key"):
        _route(name, training=False, state={"step": jnp.int32(0)})


def _route(name: str, **given) -> Routing:
    router, (k, _) = ROUTERS[name], _possible(name)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 8)), jnp.float32)
    places = jnp.broadcast_to(jnp.arange(4), (1, 4))
    inputs = {
        "token_ids": places,
        "positions": places,
        "documents": jnp.ones((1, 4), jnp.int32),
        "tokens": jnp.ones((1, 4, 6)),
        "path_probs": jax.nn.softmax(jnp.ones((1, 4, 2, 8))),
        "path_expert": jnp.zeros((1, 4, 2), jnp.int32),
        "foreseen": jnp.zeros((1, 4)),
        **given,
    }
    valid = jnp.ones((1, 4), bool)
    return router.route(logits, valid, k=k, **pick_inputs(router.route, inputs))


C3 = [name for name, router in ROUTERS.items() if router.causality == "C3"]


@pytest.mark.parametrize("name", ROUTERS)
def test_language_models_refuse_exactly_the_noncausal(name):
    if name not in C3:
        check_causal(name)
        return
    with pytest.raises(ConfigError) as error:
        check_causal(name)
    _is_told(error, repr(name), "C3", "allow_noncausal=True", "task.name='classify'")


@pytest.mark.parametrize("name", C3)
def test_noncausal_router_stops_before_the_data(name):
    """`files` that do not exist would be the next mistake; nothing has looked for them."""
    path = f"configs/quickstart.py:router={name}"
    config = load_config(path, [("data.name", "files"), ("data.files", "nothing/*.txt")])
    with pytest.raises(ConfigError, match="allow_noncausal=True"):
        setup.set_up(config)
