"""Runs a sweep: many points of a search space, several seeds each, on one or many machines.

    python3 scripts/sweep.py --config=configs/sweeps/routing.py --workdir=runs/routing --workers=2

Run the same command again to go on with a sweep that was stopped or killed. `--config.key=value` fixes
a key for all trials. With `--storage=postgresql://...` many machines work on one sweep.
"""

from pathlib import Path
import sys

from absl import flags

from moe import cli
from moe.errors import ConfigError
from moe.sweep.load import load_sweep
from moe.sweep.run import run_sweep
from moe.sweep.table import to_text

TRAIN = Path(__file__).resolve().parent.parent / "train.py"

WORKDIR = flags.DEFINE_string("workdir", None, "Where the sweep and its runs are kept.")
WORKERS = flags.DEFINE_integer("workers", 1, "Trials that train at once on this machine.")
STORAGE = flags.DEFINE_string("storage", None, "Optuna database address; a file in the workdir.")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 1 with no complete point, 75 stopped before the end."""
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest)
    if path is None or WORKDIR.value is None:
        raise ConfigError("a sweep needs --config=configs/sweeps/FILE.py and --workdir=DIR.")
    sweep = load_sweep(path, overrides)
    outcome = run_sweep(
        sweep,
        WORKDIR.value,
        command=[sys.executable, str(TRAIN)],
        workers=WORKERS.value,
        storage=STORAGE.value,
        announce=lambda line: print(line, flush=True),
    )
    print(to_text(outcome.rows, sweep))
    print(f"{WORKDIR.value}/results.csv  {WORKDIR.value}/report.html")
    return outcome.exit_code


if __name__ == "__main__":
    cli.run(main)
