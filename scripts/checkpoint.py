"""Looks at, verifies, thins out and converts the checkpoints of a run. DIR is a workdir.

    python3 scripts/checkpoint.py list DIR
    python3 scripts/checkpoint.py verify DIR [--step=1000]
    python3 scripts/checkpoint.py prune DIR --keep_latest=2 --keep_best=1 [--dry_run]
    python3 scripts/checkpoint.py convert DIR --to=FOLDER [--step=1000] [--all]
    python3 scripts/checkpoint.py convert FOLDER --to=DIR

`convert` writes `model.safetensors` and `record.json`, and makes a checkpoint of such a folder.
Exit codes: 0 all is well, 2 usage or a workdir in use, 4 a checkpoint that is damaged or missing.
"""

from pathlib import Path

from absl import flags

from moe import cli
from moe.errors import CheckpointError, ConfigError
from moe.evaluation.evaluate import best_rule
from moe.training import conversion, inspection
from moe.training.keeping import KeepRules
from moe.training.workdir import CONFIG_FILE, open_workdir, read_config, write_config

FLAGS = flags.FlagValues()
flags.DEFINE_integer("step", None, "One step; without it all, or the newest.", flag_values=FLAGS)
flags.DEFINE_integer("keep_latest", None, "Newest steps that stay.", flag_values=FLAGS)
flags.DEFINE_integer("keep_best", None, "Best steps that stay.", flag_values=FLAGS)
flags.DEFINE_bool("dry_run", False, "Say what would be deleted.", flag_values=FLAGS)
flags.DEFINE_string("to", None, "Where to convert to.", flag_values=FLAGS)
flags.DEFINE_bool("all", False, "Convert the optimiser and all else, too.", flag_values=FLAGS)


def main(argv: list[str]) -> int:
    """A command and a folder, then flags."""
    commands = {"list": show, "verify": verify, "prune": prune, "convert": convert}
    words = [word for word in argv[1:] if not word.startswith("-")]
    cli.parse_flags([word for word in argv if word not in words], FLAGS)
    if len(words) != 2 or words[0] not in commands:
        raise ConfigError(
            f"usage: python3 scripts/checkpoint.py {'|'.join(commands)} DIR [--flag=value ...]; "
            "--help tells more."
        )
    commands[words[0]](Path(words[1]).expanduser().absolute())
    return 0


def show(given: Path) -> None:
    """One line a step."""
    directory = inspection.checkpoints_of(given)
    for entry in inspection.entries(directory):
        metrics = " ".join(f"{name}={value:.6g}" for name, value in entry.metrics.items())
        trust = "trusted" if entry.flaw is None else f"not trusted: {entry.flaw}"
        kind = "-" if entry.format is None else entry.format
        print(f"step {entry.step}  {entry.size} bytes  format {kind}  {trust}  {metrics}".rstrip())


def verify(given: Path) -> None:
    """Raises CheckpointError naming each file and leaf that is not as it was saved."""
    directory = inspection.checkpoints_of(given)
    steps = [entry.step for entry in inspection.entries(directory)]
    if FLAGS.step is not None:
        if FLAGS.step not in steps:
            raise CheckpointError(f"There is no checkpoint {FLAGS.step} in {directory}: {steps}.")
        steps = [FLAGS.step]
    bad = {}
    for step in steps:
        flaws = inspection.flaws(directory / str(step))
        bad |= {step: flaws} if flaws else {}
        print(f"step {step}: {'; '.join(flaws) if flaws else 'all as it was saved'}")
    if bad or not steps:
        raise CheckpointError(
            f"Checkpoints {sorted(bad)} in {directory} are not as they were saved. Training passes "
            "over what does not read back; restore them from a copy, or move them away."
            if bad
            else f"There is no checkpoint in {directory}."
        )


def prune(given: Path) -> None:
    """Deletes what no rule keeps."""
    cli.require_flags(keep_latest=FLAGS.keep_latest, keep_best=FLAGS.keep_best)
    directory = inspection.checkpoints_of(given)
    if FLAGS.dry_run:
        _prune(directory, "would be deleted")
    else:
        with open_workdir(directory.parent):
            _prune(directory, "deleted")


def _prune(directory: Path, word: str) -> None:
    metric, mode = _best(directory.parent)
    rules = KeepRules(FLAGS.keep_latest, FLAGS.keep_best, metric, mode)
    for entry in inspection.prune(directory, rules, dry_run=FLAGS.dry_run):
        print(f"step {entry.step}  {entry.size} bytes  {word}")


def _best(workdir: Path) -> tuple[str, str]:
    """What the run tells its best checkpoint by."""
    if not (workdir / CONFIG_FILE).exists():
        return KeepRules().metric, KeepRules().mode
    rule = best_rule(cli.saved_config(read_config(workdir)["config"]).task.name)
    return rule.metric, rule.mode


def convert(given: Path) -> None:
    """From a workdir to safetensors, or back."""
    cli.require_flags(to=FLAGS.to)
    target = Path(FLAGS.to).expanduser().absolute()
    if (given / conversion.ARRAYS_FILE).exists():
        target = target.parent if target.name == inspection.CHECKPOINTS else target
        with open_workdir(target) as workdir:
            step, meta = conversion.from_safetensors(given, workdir / inspection.CHECKPOINTS)
            if "config" in meta and not (workdir / CONFIG_FILE).exists():
                write_config(workdir, meta["config"])
        print(f"step {step} is in {target}")
        return
    directory = inspection.checkpoints_of(given)
    steps = [entry.step for entry in inspection.entries(directory) if entry.flaw is None]
    step = FLAGS.step if FLAGS.step is not None else max(steps, default=None)
    if step not in steps:
        raise CheckpointError(f"There is no sound checkpoint {step} in {directory}: {steps}.")
    conversion.to_safetensors(directory, step, target, everything=FLAGS.all)
    print(f"step {step} is in {target}")


if __name__ == "__main__":
    cli.run(main)
