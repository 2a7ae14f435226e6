"""What routing costs: the share of the decision itself in a sparse layer, for every router.

    python3 benchmarks/routers.py --shape=A,C --routers=switch,topk,deepseek_v3 --repeats=7

The decision is the gate, the choice, the report, the losses and the metrics of a training step, forward and
backward, with the settings of the router's preset (`configs/routers.py`); K is the preset's where the
method fixes it. Three compiled functions run in turn, and all figures are of medians, as ratios, because
absolute times move with whatever else the machine does:

* whole: the layer with the router, outputs, losses and metrics, and gradients of everything;
* planned: the same experts behind the same dispatch, fed the plan that the router made, with
  gradients of experts, tokens and gates;
* decision: from tokens to plan, losses and metrics, and back from the plan's gradient.

`alone` is decision / whole: the small time is measured by itself, so that noise of the experts stays
out of it. It is the stricter figure, because nothing of the decision hides behind the experts, and the one
that bounds are about. `added` is 1 - planned / whole: what a layer would save if choices
were free. It shows what the decision by itself cannot, such as another layout or a lost fusion in
the dispatch, and is off by the noise of two large times.
"""

from collections.abc import Callable
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
from moe.routing.types import Choices, LayerReport, Plan, Slots

SHAPE = flags.DEFINE_list("shape", ["A", "C"], "which of the shapes to measure")
NAMES = flags.DEFINE_list("routers", None, "which routers; all of the table if not given")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each side", lower_bound=5)

ROWS, VOCAB = 8, 512  # sequences of a batch; token ids, for tables


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


class Inputs(NamedTuple):
    """What one layer is given."""

    x: Array  # [B S D]
    tokens: Array  # [B S]
    key: Array


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
    facts = {"sequence_length": length, "batch_size": ROWS}
    check_router(name, shape.E, k=router["k"], **facts, **options)
    options = tuple((ROUTERS[name].options | options).items())
    active = active_losses(losses, learned=ROUTERS[name].learned)
    active = tuple(loss for loss in active if loss.name != "consistency")  # of two whole passes
    return Setting(
        RouterSpec(name, router["k"], options, token_counts=(1,) * VOCAB),
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

    def call(self, inputs: Inputs) -> Call:
        """As in a training step, one document a row."""
        return Call(
            inputs.tokens,
            jnp.ones(inputs.tokens.shape, bool),
            make_dispatch("grouped", None),
            jitter=self.setting.jitter,
            key=inputs.key,
            training=True,
            shared=self.shared,
        )

    def memory(self, inputs: Inputs) -> Any:
        """What the gate of a first layer remembers."""
        return initial_memory(self.setting.spec, *inputs.tokens.shape, self.mlp.num_experts)

    def whole(self, inputs: Inputs, weights: dict[str, Array]) -> tuple[Any, Any]:
        """`(output, loss)` and what is logged."""
        done = self.mlp(inputs.x, self.call(inputs), inputs.key, self.memory(inputs))
        loss, logged = self.judge(done.report, weights)
        return (done.output, loss), logged

    def decision(self, inputs: Inputs, weights: dict[str, Array]) -> tuple[Any, Any]:
        """`(gates, loss)`, and the rest of the plan with what is logged."""
        call = self.call(inputs)
        routing, _ = self.mlp.route(inputs.x, call, inputs.key, self.memory(inputs))
        plan = routing.plan  # of which the dropless dispatch keeps every choice
        kept = plan.valid if isinstance(plan, Choices | Slots) else jnp.ones((), bool)
        loss, logged = self.judge(layer_report(routing, kept, call.valid), weights)
        gates, places = split_plan(plan)
        return (gates, loss), (places, logged)

    def planned(self, inputs: Inputs, gates: Plan, places: Plan) -> tuple[Any, Any]:
        """The output under a plan that is given."""
        params = self.mlp.experts.params(inputs.x.dtype)
        experts = partial(feed_forward, activation=self.mlp.activation)
        plan = type(gates)(*(a if b is None else b for a, b in zip(gates, places, strict=True)))
        return make_dispatch("grouped", None)(inputs.x, plan, params, experts).output, None

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


def split_plan(plan: Plan) -> tuple[Plan, Plan]:
    """The fields that carry a gradient, and the others; None in place of the rest."""
    carries = [jnp.issubdtype(a.dtype, jnp.floating) for a in plan]
    kinds = (carries, [not c for c in carries])
    both = (type(plan)(*(a if c else None for a, c in zip(plan, k, strict=True))) for k in kinds)
    return tuple(both)


def make_sides(setting: Setting, shape: Shape) -> dict[str, tuple[Callable, tuple]]:
    """`{side: (compiled function, arguments)}`, forward and backward each."""
    graph, params, rest = nnx.split(Layer(setting, shape), nnx.Param, ...)
    inputs, cotangent = draw(shape)
    weights = {n: jnp.float32(w) for n, w in setting.weights.items()}  # traced, as in a step

    def forward(method: Callable, given: tuple, others: tuple) -> Any:
        params, x, *more = given
        rest, inputs, *fixed = others
        return method(nnx.merge(graph, params, rest), inputs._replace(x=x), *more, *fixed)

    def both(method: Callable) -> Callable:
        def run(given: tuple, others: tuple, cotangents: Any) -> Any:
            run = partial(forward, method, others=others)
            out, pull, told = jax.vjp(run, given, has_aux=True)
            return out, told, pull(cotangents)

        return run

    base, others = (params, inputs.x), (rest, inputs, weights)
    decide = jax.jit(partial(forward, Layer.decision))
    (gates, loss), (places, _) = decide(base, others)
    one = jnp.ones_like(loss)
    arguments = {
        "whole": (base, others, (cotangent, one)),
        "planned": ((*base, gates), (rest, inputs, places), cotangent),
        "decision": (base, others, (jax.tree.map(jnp.cos, gates), one)),
    }
    return {
        side: (jax.jit(both(getattr(Layer, side))).lower(*given).compile(), given)
        for side, given in arguments.items()
    }


def draw(shape: Shape) -> tuple[Inputs, Array]:
    """Normal tokens with ids that know nothing of them, and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(1), 4)
    size = (ROWS, shape.T // ROWS)
    x, cotangent = (jax.random.normal(key, (*size, shape.D)) for key in keys[:2])
    return Inputs(x, jax.random.randint(keys[2], size, 0, VOCAB), keys[3]), cotangent


def measure(setting: Setting, shape: Shape, repeats: int) -> dict[str, float]:
    """Median seconds of each side."""
    runs = make_sides(setting, shape)
    times: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(repeats + 1):
        for side, (function, arguments) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times[side].append(time.perf_counter() - start)
    return {side: statistics.median(taken[1:]) for side, taken in times.items()}


def main(_: list[str]) -> None:
    """Prints a line for each router and shape."""
    reuse_buffers()
    for letter in SHAPE.value:
        shape = TABLE[letter]
        print(
            f"{letter} (T, D, F, E, K) = {tuple(shape)}\nrouter                 K   alone   added"
        )
        for name in NAMES.value or ROUTERS:
            find_router(name)
            try:
                setting = fit(name, shape)
            except ConfigError as error:
                print(f"{name:<22} cannot: {error}", flush=True)
                continue
            took = measure(setting, shape, REPEATS.value)
            alone, added = took["decision"] / took["whole"], 1 - took["planned"] / took["whole"]
            print(f"{name:<22}{setting.spec.k:>2}{alone:>8.1%}{added:>8.1%}", flush=True)


if __name__ == "__main__":
    app.run(main)
