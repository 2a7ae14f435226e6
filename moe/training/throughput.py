"""How fast the run could be: peak rates of devices, and memory."""

from collections.abc import Generator
import contextlib
import resource
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import PyTree

from moe.model.build import ModelSize

# Dense bfloat16 multiply-adds, FLOP/s a device, from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops() -> float:
    """FLOP/s of all devices of the run; on the CPU, what a float32 product of this size reaches."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_peak() * jax.process_count()
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if device.device_kind.startswith(name):
            return PEAK_FLOPS[name] * jax.device_count()
    return float("nan")  # unknown device: no utilisation is better than a wrong one


def _measured_cpu_peak(size: int = 1024, repeats: int = 5) -> float:
    """Virtual CPU devices share the machine, so one device's product is the machine's rate."""
    device = jax.local_devices()[0]
    best = float("inf")
    with jax.set_mesh(jax.make_mesh((1,), ("x",), (AxisType.Auto,), devices=[device])):
        a = jax.device_put(jnp.ones((size, size), jnp.float32), device)
        product = jax.jit(lambda x: x @ x)
        product(a).block_until_ready()
        for _ in range(repeats):
            start = time.perf_counter()
            product(a).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def memory() -> dict[str, float]:
    """Peak bytes of this host process, and of its fullest device where the device tells."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    found = {"memory/host_peak_bytes": peak}
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        found["memory/device_peak_bytes"] = float(max(peaks))
    return found


class Clock:
    """Speed between two log lines, without what ran under `paused`."""

    def __init__(self, size: ModelSize, peak: float, sequence_length: int):
        """`peak` in FLOP/s of all devices."""
        self._flops_per_token = 3.0 * size.flops_per_token  # backward is twice the forward pass
        self._peak, self._sequence_length = peak, sequence_length
        self._wait = self._paused = 0.0
        self._steps = 0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """Around the reading of one step's batch."""
        started = time.perf_counter()
        yield
        self._steps += 1
        self._wait += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self, state: PyTree) -> Generator[None]:
        """Around an evaluation or a save; waits for the steps that lead to `state` first."""
        jax.block_until_ready(state)
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def lap(self, batch_size: int) -> dict[str, float]:
        """The `speed/*` values since the last lap; call it when the step's results are there."""
        now = time.perf_counter()
        seconds = max(now - self._since - self._paused, 1e-9)
        tokens = self._steps * batch_size * self._sequence_length / seconds
        values = {
            "speed/tokens_per_second": tokens,
            "speed/step_seconds": seconds / self._steps,
            "speed/mfu": tokens * self._flops_per_token / self._peak,
            "speed/data_wait_seconds": self._wait / self._steps,
        }
        self._wait = self._paused = 0.0
        self._steps = 0
        self._since = now
        return values
