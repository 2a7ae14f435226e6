"""Runs a sweep: many points of a search space, several seeds each, on one or many machines.

    python3 scripts/sweep.py --config=configs/sweeps/routing.py --workdir=runs/routing --workers=2

Run the same command again to go on with a sweep that was stopped or killed. `--config.key=value` fixes
a key for all trials.

Many machines work on one sweep with the same command, a workdir each and one database:

    python3 -m pip install -e '.[postgres]'
    python3 scripts/sweep.py --config=... --workdir=... --storage=postgresql+psycopg://user@host/name

A machine that is silent for ten heartbeats is taken for dead, and others do its trials. A password belongs
into ~/.pgpass or PGPASSWORD, or the whole address into a variable or a file of yours: --storage=env:NAME,
--storage=file:PATH. On the command line, where every user of the machine reads it, it is refused.

Points that failed stay as they are, until you run the same command with --retry_failed: each is tried once
more, from its newest checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
import shlex
import sys

from absl import flags

from moe import cli
from moe.sweep.address import take_address
from moe.sweep.load import load_sweep
from moe.sweep.run import run_sweep
from moe.sweep.storage import PATIENCE_SECONDS
from moe.sweep.study import HEARTBEAT_SECONDS
from moe.sweep.table import Row, to_text

TRAIN = Path(__file__).resolve().parent.parent / "train.py"

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "Where the sweep and its runs are kept.", flag_values=FLAGS)
flags.DEFINE_integer("workers", 1, "Trials that train at once on this machine.", flag_values=FLAGS)
flags.DEFINE_string(
    "storage",
    None,
    "Optuna database address, or where it stands: env:NAME or file:PATH; without it, a file in the workdir.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "retry_failed",
    False,
    "Runs the points that have failed again, from their checkpoints.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "heartbeat",
    HEARTBEAT_SECONDS,
    "Seconds between signs of life in the storage; after ten without one, others take trials over.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "patience",
    PATIENCE_SECONDS,
    "Seconds that a storage that is away is waited for; trainers go on meanwhile.",
    flag_values=FLAGS,
)


def main(argv: list[str]) -> int:
    """Returns the exit code.

    0 done, 1 with no complete point or a worker that failed, 2 config, 4 a damaged storage, 6 a full
    disk or a storage that is away, 75 stopped before the end. Failed trials are rows of the table.
    """
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest, FLAGS)
    cli.require_flags(config=path, workdir=FLAGS.workdir)
    storage = None if FLAGS.storage is None else take_address(FLAGS.storage)
    sweep = load_sweep(str(path), overrides)
    outcome = run_sweep(
        sweep,
        FLAGS.workdir,
        command=[sys.executable, str(TRAIN)],
        workers=FLAGS.workers,
        storage=storage,
        retry_failed=FLAGS.retry_failed,
        heartbeat=FLAGS.heartbeat,
        patience=FLAGS.patience,
        announce=lambda line: print(line, flush=True),
    )
    print(to_text(outcome.rows, sweep))
    print(f"{FLAGS.workdir}/results.csv  {FLAGS.workdir}/report.html")
    print(failures(outcome.rows, argv), end="")
    return outcome.exit_code


def failures(rows: Sequence[Row], argv: Sequence[str]) -> str:
    """How many points failed and the command that runs them again; nothing without any."""
    failed = sum(row.state == "failed" for row in rows)
    if not failed:
        return ""
    command = [word for word in argv if word.lstrip("-").partition("=")[0] != "retry_failed"]
    again = shlex.join(["python3", *command, "--retry_failed"])
    return (
        f"{failed} of {len(rows)} points failed. Once the cause is mended, run them again; each goes on from "
        f"its newest checkpoint:\n    {again}\n"
    )


if __name__ == "__main__":
    cli.run(main)
