"""Eight virtual devices for the whole suite, compiled in a hurry, and no silent broadcasting."""

import os

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

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
