"""Eight virtual devices for the whole suite, compiled in a hurry, and no silent broadcasting."""

from collections.abc import Generator
import os
from unittest import mock

# Most of the suite's time is compilation of programs that run once: a third of it without LLVM's
# expensive passes. Child processes inherit it.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def _tests_outlive_programs() -> Generator[None, None, None]:
    """A program that runs inside a test ends, and the process of the tests goes on."""
    with mock.patch("moe.cli.leave_in_time"):
        yield
