"""NVIDIA GPUs to compile for that need not be there.

XLA's CUDA compiler asks the device it compiles for what it is, and takes a text instead of the device.
`Compiled.as_text()` and `memory_analysis()` of what it makes are those of the real compiler;
`cost_analysis()` is None, and nothing is timed: XLA picks tiles and algorithms by its models where on
the device it would try them out. It knows no limit of memory, so a program too large compiles too.
"""

from typing import NamedTuple

import jax
from jax.experimental import topologies

from moe.errors import ConfigError, did_you_mean

MACHINE = 8  # GPUs of one machine, all joined by NVLink (DGX and HGX of every kind below)


class Gpu(NamedTuple):
    """What the compiler asks. Bytes, bytes a second and GHz; `core` is a streaming multiprocessor."""

    name: str
    capability: int  # major; the minor one is 0
    extended: bool  # has the instructions of `sm_90a` or `sm_100a`: products of a whole warp group
    cores: int
    fpus_per_core: int
    clock: float
    memory: int  # as the driver counts it
    memory_bandwidth: int
    l2_cache: int
    shared_per_core: int
    shared_per_block: int
    links: int  # NVLinks


# XLA's public descriptions, https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs,
# which the driver reported; NVLinks of the A100 from its data sheet, https://www.nvidia.com/en-us/data-center/a100/.
GPUS: dict[str, Gpu] = {
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3",
        9,
        True,
        132,
        128,
        1.98,
        84942979072,
        3352320000000,
        52428800,
        233472,
        232448,
        18,
    ),
    "h200": Gpu(
        "NVIDIA H200 141GB HBM3e",
        9,
        True,
        132,
        128,
        1.98,
        151397597184,
        4800000000000,
        52428800,
        233472,
        232448,
        18,
    ),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        8,
        False,
        108,
        64,
        1.41,
        85100068864,
        2039040000000,
        41943040,
        167936,
        166912,
        12,
    ),
    "b200": Gpu(
        "NVIDIA B200",
        10,
        True,
        148,
        128,
        1.965,
        191514411008,
        7672320000000,
        132644864,
        233472,
        232448,
        18,
    ),
}

# The limits are the same for every capability since 8.0 (CUDA Programming Guide, "Compute Capabilities").
# The versions are the oldest of the extra `gpu`. That of CUB is left out: XLA would ask the driver how much
# memory a sort by CUB takes; without it, it sorts by its own kernels, which is slower on a device, and warns.
TEXT = """
gpu_device_info {{
  name: "{gpu.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: {extension} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_cache}
  shared_memory_per_core: {gpu.shared_per_core}
  shared_memory_per_block_optin: {gpu.shared_per_block}
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  ecc_enabled: true
  device_interconnect_info {{ active_links: {gpu.links} }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""


def cuda_devices(kind: str, count: int) -> list[jax.Device]:
    """Devices for a `Mesh` over which programs can be lowered and compiled, but not run.

    Args:
      kind: a key of `GPUS`.
      count: up to 8, which are one machine, or a multiple of 8; machine by machine, as `process_index` says.

    Raises:
      ConfigError: no such kind or count, or the CUDA compiler is not installed.
    """
    if kind not in GPUS:
        raise ConfigError(
            f"No GPU is called {kind!r}{did_you_mean(kind, GPUS)}. Known are {', '.join(GPUS)}; "
            "a line in moe/dryrun/cuda_target.py adds another."
        )
    machines = max(1, count // MACHINE)
    if count < 1 or (count > MACHINE and count % MACHINE):
        raise ConfigError(
            f"{count} GPUs are no whole machines of {MACHINE}: use 1 to {MACHINE}, or a multiple of {MACHINE}."
        )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=kind,
            target_config=target_text(GPUS[kind]),
            topology=f"{machines}x1x{count // machines}",  # NVLink domains, hosts of each, GPUs of each
        )
    except NotImplementedError as error:
        raise ConfigError(
            f"Programs for {kind} cannot be compiled here: JAX has no CUDA plugin, whose compiler is needed "
            "although no GPU is. Install the extra `gpu`: python3 -m pip install -e '.[gpu]' on Linux."
        ) from error
    return list(topology.devices)


def target_text(gpu: Gpu) -> str:
    """XLA's `GpuTargetConfigProto` in text form."""
    return TEXT.format(gpu=gpu, extension="ACCELERATED_FEATURES" if gpu.extended else "NONE")
