"""Grouped matrix multiplication: rows sorted by group, each times the matrix of its group.

`BACKENDS` is the table of ways to compute it. All give the same values and gradients; what differs is the
platform they are fast on. `ragged_dot` runs everywhere and is the readable twin of the rest.
"""

from collections.abc import Callable
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch.blas_matmul import blas_matmul
from moe.dispatch.blocks import blocks_matmul
from moe.dispatch.edges import vary_together
from moe.dispatch.gpu_matmul import triton_matmul
from moe.dispatch.tpu_matmul import tpu_matmul
from moe.errors import ConfigError, did_you_mean

Matmul = Callable[[Array, Array, Array], Array]  # (rows [N X], weights [E X Y], sizes [E]) -> [N Y]


class Backend(NamedTuple):
    """One way to multiply."""

    matmul: Matmul
    platforms: tuple[str, ...]  # where it runs
    # Rows beyond the last group give zero, receive zero and add to no weight's gradient, NaN included.
    # The others get the rows masked: two more passes over rows and product, each way.
    ignores_rest: bool
    note: str


CPU, GPU, TPU = ("cpu",), ("gpu", "cuda", "rocm"), ("tpu",)

BACKENDS: dict[str, Backend] = {
    "blas": Backend(blas_matmul, CPU, True, "NumPy's BLAS, a call a group; float32"),
    "blocks": Backend(
        blocks_matmul, CPU + GPU + TPU, True, "loops over windows of rows; for the CPU"
    ),
    "ragged_dot": Backend(
        jax.lax.ragged_dot,
        CPU + GPU + TPU,
        False,
        "XLA's own; on CPU and GPU it builds an E x N x X tensor, on TPU its weight gradient costs E times the "
        "operations",
    ),
    "triton": Backend(triton_matmul, GPU, True, "Pallas kernels on GPU, by tiles of rows"),
    "megablox": Backend(tpu_matmul, TPU, True, "Pallas kernels on TPU, by tiles of rows"),
}

DEFAULTS = dict.fromkeys(CPU, "blas") | dict.fromkeys(GPU, "triton") | {"tpu": "megablox"}


def default_backend(platform: str) -> str:
    """The fastest back end of a platform, by its name in JAX: `cpu`, `gpu`, `cuda`, `rocm` or `tpu`.

    On a CPU whose OpenBLAS is held to another processor's kernels by OPENBLAS_CORETYPE, that is `blocks`.
    """
    if platform in CPU and os.environ.get("OPENBLAS_CORETYPE"):
        return "blocks"
    return DEFAULTS.get(platform, "ragged_dot")


def check_backend(name: str, platform: str | None = None) -> None:
    """Refuses a back end that does not exist, or that does not run on `platform`.

    Raises:
      ConfigError: it names what would do.
    """
    if name not in BACKENDS:
        raise ConfigError(
            f"dispatch.backend={name!r} is not a grouped matrix product{did_you_mean(name, BACKENDS)}; use "
            f"one of {', '.join(sorted(BACKENDS))}, or 'auto' to choose by platform."
        )
    platforms = BACKENDS[name].platforms
    if platform is not None and platform not in platforms:
        raise ConfigError(
            f"dispatch.backend={name!r} runs on {', '.join(platforms)} and this is {platform}; use "
            f"{default_backend(platform)!r}, or 'auto' to choose by platform."
        )


def grouped_matmul(
    rows: Float[Array, "N X"],
    weights: Float[Array, "E X Y"],
    sizes: Int[Array, " E"],
    backend: str | None = None,
) -> Float[Array, "N Y"]:
    """Multiplies the first `sizes[0]` rows by `weights[0]`, the next `sizes[1]` by `weights[1]`, ...

    Rows beyond the last group give zero and receive no gradient, whatever they hold, NaN included.

    Args:
      rows: sorted by group; `sum(sizes) <= N`.
      weights: one matrix a group.
      sizes: int32; a group may be empty.
      backend: a key of `BACKENDS`; None is the default of the platform that JAX runs on, which is not the
        one compiled for where that is another: name it there.

    Raises:
      ConfigError: no back end has that name.
    """
    backend = backend or default_backend(jax.default_backend())
    check_backend(backend)
    rows, weights, sizes = vary_together(rows, weights, sizes)
    matmul, _, ignores_rest, _ = BACKENDS[backend]
    if ignores_rest:
        return matmul(rows, weights, sizes)
    inside = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]
    # Masked on both sides: a zero times a NaN is a NaN, so the rows must be gone before the product,
    # and the mask after it also stops the cotangents of these rows.
    product = matmul(jnp.where(inside, rows, 0), weights, sizes)
    return jnp.where(inside, product, 0)
