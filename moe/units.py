"""Sizes as text, in the unit that leaves one to three digits before the point."""

BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
DECIMAL = ("B", "kB", "MB", "GB", "TB")


def memory_size(size: int | float) -> str:
    """Bytes of memory, in powers of 1,024: `1.50 GiB`."""
    return _text(size, 1024.0, BINARY)


def sent_size(size: int | float) -> str:
    """Bytes on a wire, in powers of 1,000 as bandwidths are: `3.76 GB`."""
    return _text(size, 1000.0, DECIMAL)


def duration(seconds: int | float) -> str:
    """Seconds, or parts of one: `0.984 s`, `3.21 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.1 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _text(size: int | float, base: float, units: tuple[str, ...]) -> str:
    place = 0
    while abs(size) >= base and place < len(units) - 1:
        size, place = size / base, place + 1
    return f"{size:.0f} B" if place == 0 else f"{size:.2f} {units[place]}"
