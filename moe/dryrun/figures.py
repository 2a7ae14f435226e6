"""Published figures of accelerators, for a roofline. Peaks, not what a program reaches."""

from typing import NamedTuple


class Figures(NamedTuple):
    """Of one device, as its maker publishes them."""

    flops: float  # dense bfloat16 products a second
    memory: float  # bytes
    memory_bandwidth: float  # bytes a second
    axis_bandwidth: float  # bytes a second that leave a device along one axis of its network
    slice_bandwidth: float  # bytes a second that leave a device's slice or machine
    source: str


GIB = 2.0**30
TPU_PAGES = "https://cloud.google.com/tpu/docs"

# The interchip bandwidth of a TPU is published for a chip, one way (half of the "bidirectional" figure):
# v5e 200 GB/s over the 2 axes of its torus, v5p 600 GB/s over 3, v6e 400 GB/s over 2. NVLink leaves an
# H100 at 450 GB/s through one switch, the network at 400 Gb/s an adapter (DGX H100).
FIGURES = {
    "v5e": Figures(197e12, 16 * GIB, 819e9, 100e9, 25e9 / 8, f"{TPU_PAGES}/v5e"),
    "v5p": Figures(459e12, 95 * GIB, 2765e9, 200e9, 50e9 / 8, f"{TPU_PAGES}/v5p"),
    "v6e": Figures(918e12, 32 * GIB, 1640e9, 200e9, 100e9 / 8, f"{TPU_PAGES}/v6e"),
    "h100": Figures(
        989.4e12, 80 * GIB, 3.35e12, 450e9, 50e9, "https://www.nvidia.com/en-us/data-center/h100/"
    ),
}
