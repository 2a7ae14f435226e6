"""One router: its functions, its gate, and what the rest of the framework must know about it."""

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple

from jaxtyping import PRNGKeyArray, Shaped
import numpy as np

from moe.routing.gates import LinearGate
from moe.routing.types import Routing, State

# What a function of a router may ask for by parameter name. Whatever else has a default is an
# option of the router; whatever else has none comes from its gate.
INPUTS = frozenset(
    {
        *("logits", "valid", "k", "key", "state", "training"),
        *("tokens", "token_ids", "positions", "documents", "modality"),
        *("memory", "shared", "rngs", "width", "num_experts", "vocab_size", "token_counts"),
        *("counts", "stats", "cost", "sequence_length", "batch_size"),
    }
)


def drawing(route: Callable[..., Routing]) -> Callable[..., Routing]:
    """The same `route` for a row that draws in evaluation too: without a key it raises.

    Raises:
        ValueError: no key, where `route` itself would go without noise and say nothing.
    """

    @functools.wraps(route)  # the signature too, which options are read from
    def drawn(*args: Any, **named: Any) -> Routing:
        if named.get("key") is None:
            raise ValueError("this router draws in training and in evaluation: pass a key")
        return route(*args, **named)

    return drawn


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


def keep_state(state: State) -> State:
    """The update of a state that never changes."""
    return state


def no_check(num_experts: int, *, k: int) -> None:
    """The check of a router without options of its own."""
    del num_experts, k


class Router(NamedTuple):
    """One way to choose experts.

    A function takes only what it names. `INPUTS` come from the layer; parameters with a default
    are options, `router.<option>` in the config; a parameter of `route` without a default is an
    entry of the gate's `Gated.inputs`.

    * `route(logits, valid, *, k, ...) -> Routing` is pure.
    * `gate(width, num_experts, *, rngs, ...)` is a module, `gate(tokens, ...) -> Gated`; None
      stands for zero logits and nothing to learn.
    * `init_state(num_experts, vocab_size, k, key, ...) -> State` makes one layer's state and may
      be traced and vmapped over `key`.
    * `update_state(state, ...) -> State` runs once for each optimiser step. It may ask for
      `counts [... E]` and `tokens [...]` of the global batch, `stats`, a dict of the sums of
      `Routing.terms`, and `cost`, the mean cross-entropy in nats.
    * `check(num_experts, *, k, ...)` raises `ConfigError` for what `route` cannot do.
    * `shared(width, num_experts, *, rngs, ...)` makes one module that the gates of all layers get
      as `shared`.
    """

    route: Callable[..., Routing]
    paper: str
    equation: str = ""
    cost: str = ""
    use: str = ""
    check: Callable[..., None] = no_check
    gate: Callable[..., Any] | None = LinearGate
    plan: str = "choices"  # or slots, mixing, merging
    # C0: a choice depends on its own token; C1: on earlier tokens of its sequence too; C3: on any.
    causality: str = "C0"
    causal_in_eval: bool = True  # whether a C3 router has a form for evaluation that is C0 or C1
    fixed_k: bool = True
    needs_key_in_eval: bool = False
    permutes_experts: bool = True  # renumbering experts renumbers choices and changes nothing else
    stateful: bool = False
    traced: tuple[str, ...] = ()  # options of `route` that may be traced scalars
    init_state: Callable[..., State] = no_state
    update_state: Callable[..., State] = keep_state
    shared: Callable[..., Any] | None = None

    @property
    def learned(self) -> bool:
        """Whether there is a gate."""
        return self.gate is not None

    @property
    def needs_token_ids(self) -> bool:
        """Whether the decision reads the ids of the input tokens."""
        return "token_ids" in inspect.signature(self.route).parameters

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its default."""
        options: dict[str, Any] = {}
        for function in self.functions:
            options |= options_of(function)
        return options

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """All that may take options."""
        found = [self.route, self.init_state, self.update_state, self.gate, self.shared]
        return [function for function in found if function is not None]


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the named parameters of a function or of a class's constructor."""
    # The signature of a module class is that of its metaclass; the constructor has the names.
    function = function.__init__ if isinstance(function, type) else function
    found = inspect.signature(function).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {n: p for n, p in found.items() if n != "self" and p.kind not in variadic}


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the options, with defaults, that one function of a router takes."""
    return {
        name: parameter.default
        for name, parameter in parameters_of(function).items()
        if name not in INPUTS and parameter.default is not parameter.empty
    }


def pick_options(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a router's options that is meant for `function`."""
    return {name: options[name] for name in options_of(function) if name in options}


def pick_inputs(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns those of the layer's inputs that `function` names."""
    return {name: inputs[name] for name in parameters_of(function) if name in inputs}
