"""Evaluates a checkpoint of a run, on whatever devices are there.

    python3 eval.py --workdir=runs/quickstart --step=best --split=test
    python3 eval.py --workdir=runs/quickstart --matrix='router.k=1,2,4;dispatch.capacity_factor=1.0,none'
    python3 eval.py --workdir=runs/quickstart --generate='def main('

It prints quality by domain and routing, then the triad: scores with bootstrap intervals, cost, and the same
scores on other data (`evaluation.generalisation` of the config).

Overrides (`--config.router.k=4`) change how the checkpoint is run. Evaluation drops no token unless asked:
`dispatch.capacity_factor`, given here, is the capacity of this evaluation.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from moe import early_signals

    early_signals.listen()

from collections.abc import Iterable, Sequence
import json
from pathlib import Path
from typing import Any, NamedTuple
import zlib

from absl import flags
import jax
from jax.sharding import NamedSharding, PartitionSpec

from moe import cli, setup
from moe.axes import MESH_AXES
from moe.config import ConfigDict
from moe.data import tokenizers
from moe.data.router_valid import ROUTER_VALID
from moe.errors import CheckpointError, DataError
from moe.evaluation import matrix, tables
from moe.evaluation.causality import check_generation
from moe.evaluation.compare import Numbers, compare, make_comparison_step, saturation_metrics
from moe.evaluation.evaluate import Evaluation, best_rule
from moe.evaluation.generate import check_numbers, generate, until
from moe.evaluation.kept_choices import history
from moe.evaluation.record import write_json
from moe.evaluation.triad import triad_table
from moe.judging import Check, Judge, check_judging, parameter_shapes, prepare_checks
from moe.model.build import model_size
from moe.parallel import compile_cache, distributed
from moe.parallel.host_memory import reuse_buffers
from moe.parallel.mesh import batch_shards, fits
from moe.session import explained
from moe.setup import Run
from moe.training.checkpoint import Checkpointer
from moe.training.state import abstract_state, bind
from moe.training.workdir import read_config

FLAGS = flags.FlagValues()  # of this program: another one may import it
flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=FLAGS)
flags.DEFINE_string("step", "latest", "Checkpoint: latest, best or a number.", flag_values=FLAGS)
flags.DEFINE_string("split", "valid", "Which data: any split but train.", flag_values=FLAGS)
flags.DEFINE_bool(
    "generalisation",
    True,
    "Evaluates on train and on the data of evaluation.generalisation too, and compares.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "matrix", None, "Combinations, as key=value,value;key=value,value.", flag_values=FLAGS
)
flags.DEFINE_string(
    "reference_step",
    None,
    "Another checkpoint, or `all` that are kept: how much of the later one's routing the earlier one "
    "did already.",
    flag_values=FLAGS,
)
flags.DEFINE_string("generate", None, "A prompt to continue.", flag_values=FLAGS)
flags.DEFINE_integer("length", 200, "Tokens to generate.", flag_values=FLAGS)
flags.DEFINE_float(
    "temperature", 0.8, "Of generation; 0 takes the most likely token.", flag_values=FLAGS
)
flags.DEFINE_float(
    "top_p", 0.95, "Of generation: probability of the set that is sampled from.", flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "Of generation.", flag_values=FLAGS)
distributed.define_flags(FLAGS)
compile_cache.define_flag(FLAGS)


class Checkpoint(NamedTuple):
    """A restored model and how to run it."""

    run: Run
    step: int
    params: Any
    router: Any


def main(argv: list[str]) -> int:
    """Restores, then evaluates, tabulates combinations or generates."""
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest, FLAGS)
    cli.require_flags(workdir=FLAGS.workdir)
    if path is not None:
        raise cli.ConfigError("--config=FILE is not for eval.py: the run's own config is used.")
    workdir = Path(FLAGS.workdir)
    saved = read_config(workdir)["config"]
    combinations = None if FLAGS.matrix is None else matrix.parse(FLAGS.matrix)
    numbers: dict[str, Any] = {
        name: FLAGS[name].value for name in ("length", "temperature", "top_p")
    }
    check_numbers(**numbers)
    reuse_buffers()
    distributed.start_from_flags(FLAGS)
    best = best_rule(cli.saved_config(saved).task.name)
    place = workdir / "checkpoints"
    primary = jax.process_index() == 0
    with (
        Checkpointer(
            place, best_metric=best.metric, best_mode=best.mode, read_only=True
        ) as checkpointer,
        compile_cache.persistent(workdir, FLAGS.compile_cache, primary=primary),
    ):
        step = checkpointer.resolve(_step(FLAGS.step))
        tokenizer = tokenizer_of(checkpointer, step)
        run = setup.set_up(config_for(saved, overrides), tokenizer, training=False)
        if FLAGS.generate is not None:
            check_generation(run.spec)
        check_split(run, FLAGS.split)
        check_judging(run.config, run.spec)
        references = reference_steps(run, FLAGS.reference_step, step, checkpointer)
        evaluates = FLAGS.generate is None and combinations is None
        checks = prepare_checks(run, FLAGS.split) if evaluates and FLAGS.generalisation else []
        runs = [variant(run, saved, overrides, pairs) for pairs in combinations or []]
        with jax.set_mesh(run.mesh), explained(run):
            checkpoint = restore(run, checkpointer, step)
            if FLAGS.generate is not None:
                print_continuation(checkpoint, FLAGS.generate, **numbers)
            elif combinations is not None:
                print_matrix(checkpoint, workdir, combinations, runs)
            else:
                others = (restore(run, checkpointer, other) for other in references)
                print_evaluation(checkpoint, workdir, overrides, others, checks)
    return 0


def tokenizer_of(checkpointer: Checkpointer, step: int) -> tokenizers.Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    Raises:
        CheckpointError: its record holds none, or one that cannot be read.
    """
    saved = checkpointer.load_meta(step).get("tokenizer")
    try:
        return tokenizers.from_json(saved if isinstance(saved, str) else json.dumps(saved))
    except DataError as error:
        raise CheckpointError(
            f"Checkpoint {step} has no tokenizer in its record: {error} train.py writes one; restore the "
            "checkpoint from a copy, or evaluate another with --step."
        ) from error


def check_split(run: Run, split: str) -> None:
    """Raises ConfigError for a split that the data lacks, or that the model was trained on."""
    held_out = [name for name in run.data.splits if name not in ("train", ROUTER_VALID)]
    if split not in held_out:
        raise cli.ConfigError(
            f"--split={split} is no split that was held out of training; there are {', '.join(held_out)}."
        )


def _step(text: str) -> int | str:
    if text.isdigit():
        return int(text)
    if text not in ("latest", "best"):
        raise cli.ConfigError(f"--step={text} is neither latest, best nor a number.")
    return text


def reference_steps(run: Run, text: str | None, step: int, checkpointer: Checkpointer) -> list[int]:
    """The checkpoints that `--reference_step` names, ascending.

    Raises:
        ConfigError: a dense model, or another task than an evaluation.
    """
    if text is None:
        return []
    if not run.spec.sparse_layers:
        raise cli.ConfigError("--reference_step compares routing, and a dense model has none.")
    if FLAGS.generate is not None or FLAGS.matrix is not None:
        raise cli.ConfigError("--reference_step goes with neither --generate nor --matrix.")
    if text != "all":
        return [checkpointer.resolve(_step(text))]
    return [other for other in sorted(checkpointer.all_steps()) if other != step]


def config_for(saved: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> ConfigDict:
    """The run's config with overrides; a mesh that does not fit these devices gives way to data = -1."""
    overrides = [pair for key, text in overrides for pair in _capacity(key, text)]
    config = cli.saved_config(saved, overrides)
    asked = any(key.startswith("mesh.") for key, _ in overrides)
    if not asked and not fits(config.mesh.to_dict(), jax.device_count()):
        config.mesh.update(dict.fromkeys(MESH_AXES, 1) | {"data": -1, "slices": 1})
    if "evaluation.batches" not in dict(overrides):
        config.evaluation.batches = None  # the limit was for evaluations in the training loop
    return config


def _capacity(key: str, text: str) -> list[tuple[str, str]]:
    """A capacity asked for here is that of evaluation, and `none` is dropless."""
    if key != "dispatch.capacity_factor":
        return [(key, text)]
    path = "grouped" if text.lower() in ("none", "null") else "capacity"
    return [("dispatch.eval_capacity_factor", text), ("dispatch.name", path)]


VARIED = ("model", "router", "dispatch")  # sections that a matrix may change


def variant(
    run: Run,
    saved: dict[str, Any],
    overrides: Sequence[tuple[str, str]],
    pairs: Sequence[tuple[str, str]],
) -> Run:
    """The same data and parameters, run in the way of one combination.

    Raises:
        ConfigError: a key of another section, or one that changes the shape of the model.
    """
    for key, _ in pairs:
        if key.partition(".")[0] not in VARIED:
            raise cli.ConfigError(
                f"--matrix: {key!r} is not of the sections {', '.join(VARIED)}. All combinations "
                "share data and mesh; evaluate again with --config.KEY=VALUE for another."
            )
    config = config_for(saved, [*overrides, *pairs])
    made = setup.set_up(config, run.data.tokenizer, training=False, data=run.data)
    if parameter_shapes(made) != parameter_shapes(run):
        text = ";".join(f"{key}={value}" for key, value in pairs)
        raise cli.ConfigError(
            f"--matrix: {text} makes a model of other parameters or router state than the "
            "checkpoint has. Vary what leaves both as they are, such as router.k."
        )
    return made


def restore(run: Run, checkpointer: Checkpointer, step: int) -> Checkpoint:
    """Parameters and router state on this run's mesh; the optimiser's state stays on disk."""
    template = abstract_state(run.spec, run.transformation, run.shardings)
    wanted = {"params": template.params, "router": template.router}
    state = checkpointer.restore(step, wanted, partial=True).state
    return Checkpoint(run, step, state["params"], state["router"])


def measure(checkpoint: Checkpoint, judge: Judge) -> tuple[dict[str, Any], Evaluation]:
    """The record of an evaluation of `--split`, and what it was made of."""
    run = checkpoint.run
    return setup.evaluate_split(
        run,
        judge.step(run),
        checkpoint.params,
        checkpoint.router,
        split=FLAGS.split,
        step=checkpoint.step,
        size=model_size(run.spec, run.config.data.sequence_length),
    )


def against(
    checkpoint: Checkpoint, others: Iterable[Checkpoint], record: dict[str, Any]
) -> dict[str, Any]:
    """How much of the later routing the earlier of two checkpoints does, over the whole split.

    Returns:
        `routing/saturation` and `routing/churn` against the last of `others`; all of them go to
        `record["saturation"]`.
    """
    run, found = checkpoint.run, {}
    step = make_comparison_step(
        run.skeleton, setup.dispatch_for(run, training=False), run.token_bytes
    )
    compiled = jax.jit(step, out_shardings=NamedSharding(run.mesh, PartitionSpec()))
    curve = {"steps": [], "per_layer": []}
    for other in others:
        record["saturation"] = curve
        earlier, later = sorted([checkpoint, other], key=lambda c: c.step)
        sums = compare(
            compiled,
            Numbers(earlier.params, earlier.router),
            Numbers(later.params, later.router),
            setup.eval_batches(run, FLAGS.split),
            setup.root_key(run.config.seed, 2),
            to_device=setup.to_device(run.mesh),
            limit=run.config.evaluation.batches,
        )
        found = saturation_metrics(sums)
        curve["steps"].append(other.step)
        curve["per_layer"].append(found["routing/per_layer/saturation"])
    return found


def print_evaluation(
    checkpoint: Checkpoint,
    workdir: Path,
    overrides: Sequence[tuple[str, str]],
    others: Iterable[Checkpoint],
    checks: list[Check],
) -> None:
    """Prints the tables and writes the JSON; with overrides it goes to a folder of its own."""
    run, judge = checkpoint.run, Judge(Numbers(checkpoint.params, checkpoint.router))
    record, evaluation = measure(checkpoint, judge)
    record |= judge.judge(run, FLAGS.split, record, evaluation, checks)
    if not overrides:  # which could route otherwise than the run did
        churn, curve = history(workdir, FLAGS.split, checkpoint.step)
        record["metrics"] |= churn
        record |= {"saturation": curve} if curve else {}
    record["metrics"] |= against(checkpoint, others, record)
    name = f"{FLAGS.split}-{checkpoint.step}"
    path = workdir / "eval" / f"{name}.json"
    if overrides:
        record["overrides"] = dict(overrides)
        slug = ",".join(f"{key}={text}" for key, text in overrides).replace("/", "_")
        if len(slug) > 150:  # file systems allow 255 bytes
            slug = f"{slug[:100]}-{zlib.crc32(slug.encode()):08x}"
        path = workdir / "eval" / "overrides" / f"{name}-{slug}.json"
    if jax.process_index() == 0:
        for note in setup.data_notes(run.data):
            print(f"note: {note}")
        print(tables.evaluation_table(record, run.config.task.name))
        print(f"\n{triad_table(record['triad'])}\n")
        write_json(path, record)
        print(f"written to {path}")


def print_matrix(
    checkpoint: Checkpoint,
    workdir: Path,
    combinations: list[list[tuple[str, str]]],
    runs: list[Run],
) -> None:
    """One row a combination, each the same checkpoint run in another way."""
    rows = []
    for pairs, run in zip(combinations, runs, strict=True):
        judge = Judge(Numbers(checkpoint.params, checkpoint.router))
        record, _ = measure(checkpoint._replace(run=run), judge)
        rows.append({"overrides": dict(pairs), **record})
    if jax.process_index() == 0:
        path = workdir / "eval" / "matrix" / f"{FLAGS.split}-{checkpoint.step}.json"
        print(tables.matrix_table(rows))
        write_json(path, rows)
        print(f"written to {path}")


def print_continuation(
    checkpoint: Checkpoint, prompt: str, *, length: int, temperature: float, top_p: float
) -> None:
    """Prints the prompt and what the model makes of it."""
    run = checkpoint.run
    tokenizer = run.data.tokenizer
    ids = [tokenizer.boundary, *tokenizer.encode_batch([prompt])[0].tolist()]
    new = generate(
        bind(run.skeleton, checkpoint.params, checkpoint.router),
        setup.dispatch_for(run, training=False),
        ids,
        length=length,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(FLAGS.seed),
        rows=batch_shards(run.mesh),
    )
    if jax.process_index() == 0:
        print(prompt + tokenizer.decode(until(new, tokenizer.boundary)))


if __name__ == "__main__":
    cli.run(main)
