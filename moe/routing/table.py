"""The table of routers: a new one is a file, a row here, and nothing else."""

from collections.abc import Callable
import difflib
import inspect
from typing import Any, NamedTuple

from jaxtyping import Array, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing import deepseek_v3, hash, random, switch, topk
from moe.routing.types import Routing, State

# Parameters that every router's functions share; whatever else they take is an option of its own.
_SHARED = {"logits", "valid", "k", "key", "state", "token_ids"}
_SHARED |= {"num_experts", "vocab_size", "token_counts", "counts"}


def no_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
) -> State:
    """The state of a router that has none: an empty dict."""
    del num_experts, vocab_size, k, key, token_counts
    return {}


def keep_state(state: State, counts: Shaped[Array, "*L E"]) -> State:
    """The update of a router without state."""
    del counts
    return state


def no_check(num_experts: int, *, k: int) -> None:
    """The check of a router without options of its own."""
    del num_experts, k


class Router(NamedTuple):
    """One way to choose experts, and what the rest of the framework must know about it.

    `route(logits, valid, *, k, key, state, token_ids, **options) -> Routing` is pure.
    `init_state(num_experts, vocab_size, k, key, token_counts=None, **options) -> State` makes one
    layer's state and may be traced and vmapped over `key`.
    `update_state(state, counts, **options) -> State` runs once for each optimiser step, on counts
    `[... E]` of the global batch; its options and those named in `traced` may be traced.
    `check(num_experts, *, k, **options)` raises `ConfigError` for what `route` cannot do.
    """

    route: Callable[..., Routing]
    paper: str
    check: Callable[..., None] = no_check
    learned: bool = True  # has a gate; otherwise the layer passes zero logits
    causality: str = "C0"  # C0: a token's choice depends on that token alone; C3: on later ones
    fixed_k: bool = True
    needs_key_in_eval: bool = False
    needs_token_ids: bool = False
    stateful: bool = False
    traced: tuple[str, ...] = ()  # options that may be traced scalars
    init_state: Callable[..., State] = no_state
    update_state: Callable[..., State] = keep_state


ROUTERS: dict[str, Router] = {
    "switch": Router(switch.route, "Fedus et al. 2022, arXiv:2101.03961", switch.check),
    "topk": Router(topk.route, "Jiang et al. 2024, arXiv:2401.04088; arXiv:2409.02060", topk.check),
    "deepseek_v3": Router(
        deepseek_v3.route,
        "DeepSeek-AI 2024, arXiv:2412.19437",
        deepseek_v3.check,
        stateful=True,
        traced=("scale", "bias_rate", "bias_centering"),
        init_state=deepseek_v3.init_state,
        update_state=deepseek_v3.update_state,
    ),
    "random": Router(
        random.route, "Zuo et al. 2022, arXiv:2110.04260", learned=False, needs_key_in_eval=True
    ),
    "hash": Router(
        hash.route,
        "Roller et al. 2021, arXiv:2106.04426",
        hash.check,
        learned=False,
        needs_token_ids=True,
        stateful=True,
        init_state=hash.init_state,
        update_state=hash.update_state,
    ),
}


def find_router(name: str) -> Router:
    """Returns a row of the table.

    Raises:
        ConfigError: no such router; names the nearest.
    """
    if name in ROUTERS:
        return ROUTERS[name]
    raise ConfigError(
        f"router.name={name!r} is not a router{_nearest(name, ROUTERS)}; there are "
        f"{', '.join(ROUTERS)}."
    )


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the options, with defaults, that one function of a router takes."""
    parameters = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in parameters if name not in _SHARED}


def router_options(name: str) -> dict[str, Any]:
    """Returns every option of a router with its default, read from its signatures."""
    router = find_router(name)
    options: dict[str, Any] = {}
    for function in (router.route, router.init_state, router.update_state):
        options |= options_of(function)
    return options


def pick_options(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a router's options that is meant for `function`."""
    return {name: options[name] for name in options_of(function) if name in options}


def check_router(
    name: str,
    num_experts: int,
    *,
    k: int,
    jitter: float = 0.0,
    training: bool = True,
    **options: Any,
) -> None:
    """Checks a `router` config section against the number of experts, before anything compiles.

    Args:
        name: a key of `ROUTERS`.
        num_experts: `model.num_experts`.
        k: experts a token.
        jitter: input noise of the gate.
        training: whether the gate must learn; without, k = 1 needs no gradient.
        options: the router's own options.

    Raises:
        ConfigError: an unknown name or option, or numbers that cannot work together.
    """
    router = find_router(name)
    known = router_options(name)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"router.{option} is not an option of router.name={name!r}"
                f"{_nearest(option, known)}; it takes {', '.join(known) or 'no options'}."
            )
    if not 1 <= k <= num_experts:
        raise ConfigError(
            f"router.k={k} must be between 1 and model.num_experts={num_experts}: a token's "
            "experts are all different. Change router.k or model.num_experts."
        )
    if not 0.0 <= jitter < 1.0:
        raise ConfigError(
            f"router.jitter={jitter} must be at least 0 and below 1: inputs of the gate are "
            "multiplied by 1 - jitter to 1 + jitter. The Switch paper uses 0.01."
        )
    if jitter and not router.learned:
        raise ConfigError(
            f"router.jitter={jitter} with router.name={name!r}: this router has no gate for the "
            "noise to act on. Set router.jitter=0.0."
        )
    if training or k > 1:
        router.check(num_experts, k=k, **pick_options(router.check, options))


def _nearest(name: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
