"""The train state: plain pytrees around a model that NNX splits once."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key
import optax

from moe.model.layer import RouterState
from moe.model.spec import ModelSpec
from moe.model.transformer import Transformer
from moe.parallel.rules import RULES, Rules, parameter_shardings
from moe.training import guards
from moe.training.guards import GuardState


class TrainState(NamedTuple):
    """Everything that training changes, beside the data position."""

    step: Int[Any, ""]  # int32: optimiser steps done
    params: Any  # pure dict of float32 arrays
    router: Any  # pure dict: biases, tables; no gradient, no decay
    optimizer: optax.OptState
    guard: GuardState  # what was skipped, and the losses that spikes are measured against


class Skeleton(NamedTuple):
    """The model without its numbers: how to go from pure dicts to a Transformer and back."""

    graph: nnx.GraphDef
    params: nnx.State  # of ShapeDtypeStruct
    router: nnx.State


def make_skeleton(spec: ModelSpec) -> Skeleton:
    """Splits the model once, without allocating."""
    model = nnx.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(params=0)))
    return Skeleton(*nnx.split(model, nnx.Param, RouterState))


def bind(skeleton: Skeleton, params: Any, router: Any) -> Transformer:
    """The Transformer with these numbers; traceable."""
    return nnx.merge(skeleton.graph, _fill(skeleton.params, params), _fill(skeleton.router, router))


def _fill(template: nnx.State, pure: Any) -> nnx.State:
    state = jax.tree.map(lambda leaf: leaf, template)
    nnx.replace_by_pure_dict(state, pure)
    return state


def initialize(
    spec: ModelSpec,
    transformation: optax.GradientTransformation,
    key: Key[Array, ""],
    window: int = guards.WINDOW,
) -> TrainState:
    """A fresh state; the same numbers for the same key on any mesh.

    Args:
        spec: of the model.
        transformation: of gradients.
        key: of the parameters.
        window: losses that a spike is measured against.
    """
    model = Transformer(spec, rngs=nnx.Rngs(params=key))
    _, params, router = nnx.split(model, nnx.Param, RouterState)
    params = nnx.to_pure_dict(params)
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        nnx.to_pure_dict(router),
        transformation.init(params),
        guards.fresh(window),
    )


def state_shardings(
    skeleton: Skeleton, transformation: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> TrainState:
    """A TrainState of NamedShardings: moments by the rules for them, router state replicated."""
    params = parameter_shardings(skeleton.params, mesh, rules)
    moments = params
    if rules.moments is not None:
        moments = parameter_shardings(skeleton.params, mesh, RULES[rules.moments])
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = nnx.to_pure_dict(jax.tree.map(lambda leaf: leaf, skeleton.params))
    optimizer = optax.tree.map_params(
        transformation,
        lambda _, sharding: sharding,
        jax.eval_shape(transformation.init, shapes),
        moments,
        transform_non_params=lambda _: everywhere,
    )
    router = jax.tree.map(lambda _: everywhere, nnx.to_pure_dict(skeleton.router))
    guard = GuardState(*[everywhere] * len(GuardState._fields))
    return TrainState(everywhere, params, router, optimizer, guard)


def abstract_state(
    spec: ModelSpec,
    transformation: optax.GradientTransformation,
    shardings: TrainState,
    window: int = guards.WINDOW,
) -> TrainState:
    """Shapes, dtypes and shardings of the state, for a restore; arguments as for `initialize`."""
    shapes = jax.eval_shape(lambda: initialize(spec, transformation, jax.random.key(0), window))
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )
