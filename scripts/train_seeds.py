"""Trains several seeds of one config in one process, and measures each run for a comparison.

    python3 scripts/train_seeds.py --config=configs/comparison.py --seeds=0,1,2 --workdir=runs/topk

Runs are in DIR/seed-<n>; each leaves `result.json`. The seeds share what XLA has compiled, through a
cache in DIR that goes when all are done. `scripts/compare_routers.py` starts one such process for each arm.
"""

from pathlib import Path
import shutil

from absl import flags
import jax

from moe import cli
from moe.config import import_beside
from moe.errors import ConfigError
from moe.evaluation.record import write_json
from moe.sweep.arm_runner import RESULT, stored
from moe.sweep.arms import settings_of
from moe.sweep.measure import measure
from moe.sweep.run import check_place
from moe.sweep.storage import on_disk

ROOT = Path(__file__).resolve().parent.parent

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "Folder of the runs; made if needed.", flag_values=FLAGS)
flags.DEFINE_list("seeds", ["0"], "Whole numbers.", flag_values=FLAGS)
flags.DEFINE_string("in_domain", None, "Domain of the loss; all text.", flag_values=FLAGS)
flags.DEFINE_string("out_of_domain", None, "Domain held out; none.", flag_values=FLAGS)


def main(argv: list[str]) -> int:
    """Returns the exit code of the first run that does not end well, or 0."""
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest, FLAGS)
    cli.require_flags(config=path, workdir=FLAGS.workdir)
    if not all(seed.isdigit() for seed in FLAGS.seeds):
        raise ConfigError(f"--seeds={','.join(FLAGS.seeds)} must be whole numbers: write 0,1,2.")
    train = import_beside(str(ROOT / "scripts"), "train.py").train
    workdir = Path(FLAGS.workdir).absolute()
    check_place(workdir, workers=1)
    cache = workdir / "cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with on_disk():
        workdir.mkdir(exist_ok=True)
        for seed in map(int, FLAGS.seeds):
            config = cli.load_config(str(path), [*overrides, ("seed", str(seed))])
            run = workdir / f"seed-{seed}"
            code = train(config, run)
            if code:
                return code
            metrics = measure(config, run, (FLAGS.in_domain, FLAGS.out_of_domain))
            write_json(run / RESULT, stored(settings_of(config), seed, metrics))
    shutil.rmtree(cache, ignore_errors=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
