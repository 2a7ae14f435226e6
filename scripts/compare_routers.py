"""Compares routers, or any arms of one base config, at equal data and equal seeds.

    python3 scripts/compare_routers.py --config=configs/sweeps/routers.py --workdir=runs/routers --workers=2

Writes results.csv, results.txt and report.html in the workdir. Run the same command again to go on: a
finished run is never run again, one that failed is, from its newest checkpoint. `--config.key=value` changes
a key for all arms.
"""

from pathlib import Path
import sys

from absl import flags

from moe import cli
from moe.sweep import comparison_report, comparison_table
from moe.sweep.arm_runner import run_arms
from moe.sweep.arms import Comparison, load_comparison
from moe.sweep.storage import on_disk
from moe.training.workdir import write_atomically

TRAIN = Path(__file__).resolve().with_name("train_seeds.py")

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "Where results and runs are kept.", flag_values=FLAGS)
flags.DEFINE_integer("workers", 1, "Arms that train at once.", flag_values=FLAGS)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 1 with a failed arm, 2 config, 6 full disk, 75 stopped before the end."""
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest, FLAGS)
    cli.require_flags(config=path, workdir=FLAGS.workdir)
    comparison = load_comparison(str(path), overrides)
    workdir = Path(FLAGS.workdir).absolute()
    with on_disk():
        outcome = run_arms(
            comparison,
            workdir,
            command=train_command(comparison),
            workers=FLAGS.workers,
            announce=lambda line: print(line, flush=True),
        )
        rows = comparison_table.rows(comparison, outcome.arms)
        text = comparison_table.to_text(comparison, rows)
        write_atomically(workdir / "results.csv", comparison_table.to_csv(comparison, rows))
        write_atomically(workdir / "results.txt", text + "\n")
        command = f"python3 scripts/compare_routers.py {' '.join(argv[1:])}"
        page = comparison_report.write_comparison_report(
            workdir, comparison, rows, command=command, workers=FLAGS.workers
        )
    print(text)
    print(f"{workdir}/results.csv  {page}")
    failed = sum(row.state == "failed" for row in rows)
    if failed:
        print(
            f"{failed} of {len(rows)} arms failed. Once the cause is mended, run the same command: their "
            "seeds without a result go on from their newest checkpoints."
        )
    return outcome.exit_code


def train_command(comparison: Comparison) -> list[str]:
    """The trainer of an arm, without what differs from arm to arm."""
    command = [sys.executable, str(TRAIN)]
    for flag in ("in_domain", "out_of_domain"):
        value = getattr(comparison, flag)
        if value is not None:
            command.append(f"--{flag}={value}")
    return command


if __name__ == "__main__":
    cli.run(main)
