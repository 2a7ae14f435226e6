"""What routing costs: the share of the decision itself in a sparse layer, for every router.

    python3 benchmarks/routers.py --shape=A,C --routers=switch,topk,deepseek_v3 --repeats=7

The decision is the gate, the choice, the report, the losses and the metrics of a training step, forward and
backward, with the settings of the router's preset (`configs/routers.py`); K is the preset's where the
method fixes it, and a method without a fixed K has room for 4 K choices a token. The share is

    median time of the decision by itself / median time of the layer with it

where the layer makes its output, losses and metrics, and gradients of everything; the decision goes from
tokens to plan, losses and metrics, and back from the gradient of the plan's gates to the router's
parameters and the tokens. Both are compiled and run in turn, since absolute times move with whatever
else the machine does. That nothing of the decision overlaps with or fuses into the experts makes this share
the stricter one.

`--added` also measures the layer with that plan given in advance, and prints 1 - planned / whole: what the
layer would save if choices were free. It shows what the decision by itself cannot, such as another
layout or a lost fusion in the dispatch, but is the difference of two large times and no more exact than they
are: tens of percent on a busy machine.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
import statistics
import sys
import time
from typing import Any, NamedTuple

from absl import app, flags
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import routers as presets
from moe.config import default_config
from moe.dispatch.table import make_dispatch
from moe.errors import ConfigError
from moe.model.experts import feed_forward
from moe.model.layer import Call, RouterSpec, SparseMLP, initial_memory, shared_gate
from moe.parallel.host_memory import reuse_buffers
from moe.routing import metrics
from moe.routing.loss_table import Active, active_losses, compute
from moe.routing.report import layer_report
from moe.routing.table import ROUTERS, check_router, find_router
from moe.routing.types import Choices, LayerReport, Slots

SHAPE = flags.DEFINE_list("shape", ["A", "C"], "which of the shapes to measure")
NAMES = flags.DEFINE_list("routers", None, "which routers; all of the table if not given")
ADDED = flags.DEFINE_bool("added", False, "also measure the layer with a plan given in advance")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each side", lower_bound=5)

ROWS, VOCAB = 8, 512  # sequences of a batch; token ids, for tables
WIDEST = 16  # choices a token: every one is a row of 2 F hidden numbers, several times over

Values = dict[str, Any]  # what the sides work on, by name

# What each side has gradients of.
DIFFERENTIATED = {
    "whole": ("experts", "router", "x"),
    "planned": ("experts", "x", "gates"),
    "decision": ("router", "x"),
}


class Shape(NamedTuple):
    """Sizes by the letters of `moe/axes.py`."""

    T: int
    D: int
    F: int
    E: int
    K: int


TABLE = {"A": Shape(4096, 256, 1024, 8, 2), "C": Shape(4096, 256, 1024, 128, 1)}


class Setting(NamedTuple):
    """A router fitted to a shape."""

    spec: RouterSpec
    losses: tuple[Active, ...]
    weights: dict[str, float]  # of the losses
    jitter: float | None


def fit(name: str, shape: Shape) -> Setting:
    """The preset of a router at a shape.

    Raises:
        ConfigError: the router cannot take it.
    """
    length = shape.T // ROWS
    sections = presets.get(name, presets.Size(shape.E, shape.K, length))
    router, losses = sections["router"], default_config().losses.to_dict() | sections["losses"]
    options = {n: v for n, v in router.items() if n not in ("name", "k", "jitter")}
    if router["k"] == 1 and "normalize" in ROUTERS[name].options:
        options["normalize"] = "none"  # a single gate divided by itself would teach nothing
    if "k_max" in ROUTERS[name].options:
        options["k_max"] = min(shape.E, 4 * router["k"])
    facts: dict[str, Any] = {"sequence_length": length, "batch_size": ROWS}
    check_router(name, shape.E, k=router["k"], **facts, **options)
    active = active_losses(losses, learned=ROUTERS[name].learned)
    active = tuple(loss for loss in active if loss.name != "consistency")  # of two whole passes
    return Setting(
        RouterSpec(name, router["k"], tuple(options.items()), token_counts=(1,) * VOCAB),
        active,
        {loss.name: losses[loss.name] for loss in active},
        router["jitter"] or None,
    )


class Layer(nnx.Module):
    """A sparse layer, with what its gate shares with other layers."""

    def __init__(self, setting: Setting, shape: Shape):
        rngs = nnx.Rngs(0)
        self.setting = setting
        self.mlp = SparseMLP(
            setting.spec,
            num_experts=shape.E,
            width=shape.D,
            hidden=shape.F,
            shared_experts=0,
            vocab_size=VOCAB,
            activation="swiglu",
            out_scale=1.0,
            rngs=rngs,
        )
        self.shared = shared_gate(setting.spec, shape.D, shape.E, rngs)

    def call(self, given: Values) -> Call:
        """As in a training step, one document a row."""
        return Call(
            given["tokens"],
            jnp.ones(given["tokens"].shape, bool),
            make_dispatch("grouped", None),
            jitter=self.setting.jitter,
            key=given["key"],
            training=True,
            shared=self.shared,
        )

    def memory(self, given: Values) -> Any:
        """What the gate of a first layer remembers."""
        return initial_memory(self.setting.spec, *given["tokens"].shape, self.mlp.num_experts)

    def whole(self, given: Values) -> tuple[Any, Any]:
        """`(output, loss)` and what is logged."""
        done = self.mlp(given["x"], self.call(given), given["key"], self.memory(given))
        loss, logged = self.judge(done.report, given["weights"])
        return (done.output, loss), logged

    def decision(self, given: Values) -> tuple[Any, Any]:
        """`(gates, loss)`, and the rest of the plan with what is logged."""
        call = self.call(given)
        routing, _ = self.mlp.route(given["x"], call, given["key"], self.memory(given))
        plan = routing.plan  # of which the dropless dispatch keeps every choice
        kept = plan.valid if isinstance(plan, Choices | Slots) else jnp.ones((), bool)
        loss, logged = self.judge(layer_report(routing, kept, call.valid), given["weights"])
        gates, places = split_plan(plan)
        return (gates, loss), (places, logged)

    def planned(self, given: Values) -> tuple[Any, Any]:
        """The output under a plan that is given."""
        params = self.mlp.experts.params(given["x"].dtype)
        experts = partial(feed_forward, activation=self.mlp.activation)
        fields = zip(given["gates"], given["places"], strict=True)
        plan = type(given["gates"])(*(a if b is None else b for a, b in fields))
        return make_dispatch("grouped", None)(given["x"], plan, params, experts).output, None

    def judge(self, report: LayerReport, weights: dict[str, Array]) -> tuple[Array, metrics.Totals]:
        """The weighted losses of a report, and its metrics, as the training step makes them."""
        stacked = jax.tree.map(lambda a: a[None], report)
        inputs = {
            "report": stacked,
            "total_tokens": report.row_tokens.sum(),
            "total_rows": jnp.float32(ROWS),
            "k": self.setting.spec.k,
            "valid": jnp.ones(report.expert.shape[:2], bool),
            "token_cost": jnp.ones(report.expert.shape[:2]),
        }
        if hasattr(getattr(self.mlp, "gate", None), "kernel"):
            inputs["kernels"] = self.mlp.gate.kernel[...][None]
        losses = compute(self.setting.losses, inputs)
        total = sum((weights[n] * value for n, value in losses.items()), jnp.zeros(()))
        return total, metrics.totals(stacked)


def split_plan(plan: Any) -> tuple[Any, Any]:
    """The fields of a plan that carry a gradient, and the others; None in place of the rest."""
    carries = [jnp.issubdtype(field.dtype, jnp.floating) for field in plan]
    gates = (field if c else None for field, c in zip(plan, carries, strict=True))
    places = (None if c else field for field, c in zip(plan, carries, strict=True))
    return type(plan)(*gates), type(plan)(*places)


def make_sides(
    setting: Setting, shape: Shape, which: Sequence[str]
) -> dict[str, tuple[Callable, tuple]]:
    """`{side: (compiled function, arguments)}`, forward and backward each.

    Raises:
        ConfigError: the plan is too wide.
    """
    graph, experts, router, rest = nnx.split(Layer(setting, shape), of_experts, nnx.Param, ...)
    x, tokens, key, cotangent = draw(shape)
    weights = {n: jnp.float32(w) for n, w in setting.weights.items()}  # traced, as in a step
    given: Values = {"experts": experts, "router": router, "rest": rest, "weights": weights}
    given |= {"x": x, "tokens": tokens, "key": key}

    def forward(side: str, wrt: Values, others: Values) -> Any:
        given = wrt | others
        layer = nnx.merge(graph, given["experts"], given["router"], given["rest"])
        return getattr(layer, side)(given)

    def both(side: str, wrt: Values, others: Values, cotangents: Any) -> Any:
        out, pull, told = jax.vjp(partial(forward, side, others=others), wrt, has_aux=True)
        return out, told, pull(cotangents)

    (gates, loss), (places, _) = jax.jit(partial(forward, "decision"))({}, given)
    if isinstance(gates, Choices) and gates.gate.shape[2] > WIDEST:
        raise ConfigError(
            f"a plan of {gates.gate.shape[2]} choices a token, as many times the rows of one expert: at "
            f"most {WIDEST} fit into the memory that this benchmark is meant for."
        )
    given |= {"gates": gates, "places": places}
    one, by_gates = jnp.ones_like(loss), jax.tree.map(jnp.cos, gates)
    cotangents = {"whole": (cotangent, one), "planned": cotangent, "decision": (by_gates, one)}
    sides = {}
    for side in which:
        names = DIFFERENTIATED[side]
        wrt = {n: given[n] for n in names}
        arguments = wrt, {n: v for n, v in given.items() if n not in names}, cotangents[side]
        sides[side] = jax.jit(partial(both, side)).lower(*arguments).compile(), arguments
    return sides


def of_experts(path: tuple, value: Any) -> bool:
    """Picks the experts' parameters: the decision by itself makes no gradient of them, not even 0."""
    return path[:2] == ("mlp", "experts") and isinstance(value, nnx.Param)


def draw(shape: Shape) -> tuple[Array, Array, Array, Array]:
    """Normal tokens, ids that know nothing of them, a key, and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(1), 4)
    size = (ROWS, shape.T // ROWS)
    x, cotangent = (jax.random.normal(key, (*size, shape.D)) for key in keys[:2])
    return x, jax.random.randint(keys[2], size, 0, VOCAB), keys[3], cotangent


def measure(setting: Setting, shape: Shape, which: Sequence[str], repeats: int) -> dict[str, float]:
    """Median seconds of each side, by name."""
    runs = make_sides(setting, shape, which)
    times: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(repeats + 1):
        for side, (function, arguments) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times[side].append(time.perf_counter() - start)
    return {side: statistics.median(taken[1:]) for side, taken in times.items()}


def line(name: str, shape: Shape) -> str:
    """What is printed of a router at a shape."""
    try:
        setting = fit(name, shape)
        which = tuple(DIFFERENTIATED) if ADDED.value else ("whole", "decision")
        took = measure(setting, shape, which, REPEATS.value)
    except ConfigError as error:
        return f"{name:<22} cannot: {error}"
    text = f"{name:<22}{setting.spec.k:>2}{took['decision'] / took['whole']:>8.1%}"
    if ADDED.value:
        text += f"{1 - took['planned'] / took['whole']:>8.1%}"
    return text


def main(_: list[str]) -> None:
    """Prints a line for each router and shape."""
    reuse_buffers()
    names = NAMES.value or list(ROUTERS)
    for name in names:
        find_router(name)
    for letter in SHAPE.value:
        print(f"{letter}: (T, D, F, E, K) = {tuple(TABLE[letter])}")
        print(f"{'router':<22} K   share" + ("   added" if ADDED.value else ""))
        for name in names:
            print(line(name, TABLE[letter]), flush=True)


if __name__ == "__main__":
    app.run(main)
