"""Processes and devices: who takes part in the run."""

import ipaddress
import os
import sys

from absl import flags
import jax

from moe.errors import EXIT_PREEMPTED, ConfigError

HEARTBEAT_SECONDS = 100  # JAX's own
_SHUTDOWN_SECONDS = 300  # that a process which is done waits for those that still write


def define_flags(values: flags.FlagValues) -> None:
    """The flags that every entry point shares."""

    def integer(name: str, text: str) -> None:
        flags.DEFINE_integer(name, None, text, flag_values=values)

    integer("cpu_devices", "Virtual CPU devices of this process.")
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0, of several processes.",
        flag_values=values,
    )
    integer("num_processes", "Processes of the run.")
    integer("process_id", "Number of this process, from 0.")
    flags.DEFINE_integer(
        "heartbeat_seconds",
        HEARTBEAT_SECONDS,
        "Without a sign of life for so long a process of several is taken for dead, and all end.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "detect_cluster",
        False,
        "Take these three from Slurm, Open MPI, the TPU pod or Kubernetes.",
        flag_values=values,
    )


def start_from_flags(values: flags.FlagValues) -> None:
    """`start` with the values of the flags."""
    start(
        cpu_devices=values.cpu_devices,
        coordinator_address=values.coordinator_address,
        num_processes=values.num_processes,
        process_id=values.process_id,
        detect_cluster=values.detect_cluster,
        heartbeat_seconds=values.heartbeat_seconds,
    )


def start(
    *,
    cpu_devices: int | None = None,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    detect_cluster: bool = False,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Joins the other processes of the run. Call it before anything touches a device.

    Args:
        cpu_devices: virtual CPU devices of this process, in place of the machine's own.
        coordinator_address: `host:port` of process 0. A loopback address is also what it listens on;
            with another address it listens on all interfaces, as JAX does.
        num_processes: processes of the run.
        process_id: number of this one, from 0.
        detect_cluster: let JAX find all three in the environment of Slurm, Open MPI, a TPU pod or
            Kubernetes. Process 0 then listens on all interfaces, or on what the environment variable
            JAX_COORDINATOR_BIND_ADDRESS (`host:port`) says.
        heartbeat_seconds: without a sign of life for so long a process is taken for dead; the others
            are ended by SIGABRT.

    Raises:
        ConfigError: some of the three are missing, or out of range; no cluster was found.
    """
    if cpu_devices is not None:
        if cpu_devices < 1:
            raise ConfigError(f"--cpu_devices={cpu_devices} must be at least 1.")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if detect_cluster:
        named = [name for name, value in given.items() if value is not None]
        _join_cluster(named, heartbeat_seconds)
        return
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if coordinator_address is None or num_processes is None or process_id is None:
        raise ConfigError(
            f"{', '.join(missing)} missing: a run of several processes needs {', '.join(given)}, or "
            "--detect_cluster under Slurm, Open MPI or on a TPU pod."
        )
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id={process_id} must be in 0 ... {num_processes - 1} (--num_processes={num_processes})."
        )
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        coordinator_bind_address=coordinator_address if is_loopback(coordinator_address) else None,
        initialization_timeout=120,
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )


def leave_on_failure(code: int) -> None:
    """Ends a process of several at once if it fails; alone, or with nothing wrong, it does nothing.

    The usual exit waits at a barrier for the other processes. They cannot come to it from a step that
    needs this one, so that all would be ended by SIGABRT later and the exit code would be lost.

    Args:
        code: what the process is about to return to the shell.
    """
    if code in (0, EXIT_PREEMPTED) or not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join_cluster(given: list[str], heartbeat_seconds: int) -> None:
    if given:
        raise ConfigError(
            f"--detect_cluster with {', '.join(given)}: the cluster tells all three. Leave out one or "
            "the other."
        )
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=heartbeat_seconds, shutdown_timeout_seconds=_SHUTDOWN_SECONDS
        )
    except ValueError as error:
        raise ConfigError(
            f"--detect_cluster found no cluster ({error}) It reads the variables that srun, mpirun, a TPU pod "
            "or Kubernetes sets for each process: start the processes by one of them, or give "
            "--coordinator_address, --num_processes and --process_id."
        ) from error


def is_loopback(address: str) -> bool:
    """Whether `host:port` stays on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
