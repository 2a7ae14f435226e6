"""Where the processes of a run wait for each other without using a device."""

from orbax.checkpoint import multihost

_PATIENCE_SECONDS = (
    4 * 3600
)  # of compilation, or of preparing data; a dead peer is noticed long before


def meet(name: str) -> None:
    """Returns once every process of the run has come here; alone it does nothing.

    A collective gives up after a while, 30 seconds for gloo on CPUs, if a process comes late to it.
    Call this before one that follows work of which processes have unequal shares: reading a cache
    against compiling, prepared data against data to prepare.

    Args:
        name: the same on every process.
    """
    multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * _PATIENCE_SECONDS)
