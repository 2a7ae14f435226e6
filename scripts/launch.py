"""Runs a program as one or several processes on this machine, and starts it again when it was cut short.

    python3 scripts/launch.py --processes=2 --cpu_devices=4 --restarts=5 -- train.py --config=... --workdir=...

What follows `--` is for Python. Each process gets --coordinator_address, --num_processes, --process_id,
--heartbeat_seconds and --cpu_devices from the launcher. Process 0 prints as usual, the others with `[1] `
before each line. SIGTERM and Ctrl-C are passed on: the run saves its state and ends with 75; a second Ctrl-C
kills it (130). When a process fails, the others end within the heartbeat and 5 seconds.

Started again: after 75 that nobody asked the launcher for, after 70 (stuck), after SIGKILL, SIGABRT, SIGSEGV,
SIGBUS and SIGTERM; at most --restarts times, and twice in a row without a newer checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
import sys

from absl import flags

from moe.errors import ConfigError, UserError
from moe.parallel.launch import Plan, launch

OWN = ("coordinator_address", "num_processes", "process_id", "cpu_devices", "heartbeat_seconds")

FLAGS = flags.FlagValues()
flags.DEFINE_integer("processes", 1, "Processes to start.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "cpu_devices", None, "Virtual CPU devices of each.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer("restarts", 0, "Starts after the first.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer(
    "heartbeat",
    100,
    "Seconds without a sign of life, after which a process is taken for dead.",
    lower_bound=1,
    flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> int:
    """Reads the command line; returns what `launch` does."""
    own, command = split(argv)
    if {"-h", "-help", "--help"} & set(own):
        print(f"{__doc__}\n{FLAGS.get_help(include_special_flags=False).strip()}")
        return 0
    try:
        left = FLAGS(own)[1:]
    except flags.Error as error:
        raise ConfigError(f"{error}.") from error
    if left or not command:
        raise ConfigError(
            f"{' '.join(left) or 'nothing'} where `-- PROGRAM.py FLAGS` is expected: write for example "
            "launch.py --processes=2 -- train.py --config=configs/quickstart.py --workdir=runs/quickstart."
        )
    return launch(
        Plan(
            command,
            FLAGS.processes,
            FLAGS.cpu_devices,
            FLAGS.restarts,
            FLAGS.heartbeat,
            workdir_of(command),
        )
    )


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is before and after `--`.

    Raises:
        ConfigError: the program is given a flag that the launcher sets.
    """
    cut = list(argv).index("--") if "--" in argv else len(argv)
    command = list(argv[cut + 1 :])
    for argument in command:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name in OWN:
            raise ConfigError(
                f"{argument} after `--`: the launcher gives --{name} to each process itself. Leave it out; "
                "launch.py --help lists the flags to give before `--`."
            )
    return list(argv[:cut]), command


def workdir_of(command: Sequence[str]) -> Path | None:
    """The folder that the program was given, whose checkpoints tell whether it gets on."""
    found = None
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        name, has_value, value = argument.partition("=")
        if name in ("--workdir", "-workdir"):
            found = value if has_value else following
    return Path(found).expanduser() if found else None


if __name__ == "__main__":  # without moe.cli, which imports JAX
    try:
        sys.exit(main(sys.argv))
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
