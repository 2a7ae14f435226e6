"""What `eval.py` reports beside the loss: scores of a split with intervals, and of other data."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from moe import programs, setup
from moe.cli import complete_config
from moe.config import ConfigDict, nearest
from moe.errors import ConfigError
from moe.evaluation.bootstrap import Interval
from moe.evaluation.compare import Numbers
from moe.evaluation.decode import Decoding, check_decoding
from moe.evaluation.evaluate import EvalStep, Evaluation
from moe.evaluation.evidence import decode_split, domain_scores, split_scores
from moe.evaluation.scores import primary_score
from moe.evaluation.triad import cost_of, triad
from moe.model.build import takes_padding
from moe.model.spec import ModelSpec
from moe.parallel.meeting import meet
from moe.training.state import abstract_state, bind

TRAIN_GAP = "train"  # the check that `evaluation.train_gap` asks for
DECODING_KEY = 4  # purpose of `setup.root_key`


class Check(NamedTuple):
    """Other data that a model is tried on."""

    name: str
    run: setup.Run
    split: str
    batches: int | None  # at most


def parameter_shapes(run: setup.Run) -> dict[str, Any]:
    """Shape and dtype of every parameter and router state, by path."""
    state = abstract_state(run.spec, run.transformation, run.shardings)
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.router))
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}


def decoding_of(config: ConfigDict) -> Decoding | None:
    """How the config wants targets to be written; None where it does not."""
    section = config.evaluation
    if section.decode == "none":
        return None
    return Decoding(
        section.decode,
        length=section.decode_length,
        beam=section.beam,
        alpha=section.length_penalty,
    )


def check_judging(config: ConfigDict, spec: ModelSpec) -> None:
    """Raises ConfigError for a score or a way to decode that there is not, or not for this model."""
    primary_score(config.task.name, config.evaluation.primary)
    decoding = decoding_of(config)
    if decoding is not None:
        check_decoding(decoding)
    if config.evaluation.decode != "none" and not takes_padding(spec):
        raise ConfigError(
            f"evaluation.decode={config.evaluation.decode!r} with router.name={spec.router.name!r} and "
            f"attention.name={spec.attention.name!r}: one of them goes by places in the row, so that "
            "prompts of different lengths cannot be written behind together. Set evaluation.decode='none', "
            "or choose a router of class C0 and attention.name='full'."
        )


def prepare_checks(run: setup.Run, split: str) -> list[Check]:
    """Opens the data of every check that the config names; nothing compiles.

    Args:
        run: of the config.
        split: what a check reads that names none.

    Raises:
        ConfigError: unknown keys or splits, or data that makes a model of another shape.
        DataError: data that cannot be read.
    """
    section, found = run.config.evaluation, []
    if section.train_gap:
        found.append(Check(TRAIN_GAP, run, "train", section.train_gap))
    checks = section.generalisation  # None where an override says none
    for name, changes in (checks.to_dict() if checks else {}).items():
        made = setup.set_up(
            _config_of(run.config, name, changes), run.data.tokenizer, training=False
        )
        other = changes.get("split", split)
        made.data.check_split(other)
        if parameter_shapes(made) != parameter_shapes(run):
            raise ConfigError(
                f"evaluation.generalisation.{name}={changes} makes a model of other parameters than the "
                "run has: other classes, or frames of another shape. Check on data of the same classes "
                "and frames."
            )
        if made.data.classes != run.data.classes and run.config.task.name == "classify":
            raise ConfigError(
                f"evaluation.generalisation.{name}={changes} has the classes {made.data.classes}, and "
                f"the run learned {run.data.classes}. Check on data of the same classes, in that order."
            )
        found.append(Check(name, made, other, section.batches))
    return found


def _config_of(config: ConfigDict, name: str, changes: Any) -> ConfigDict:
    """The run's config with other values in the section `data`."""
    if not isinstance(changes, Mapping):
        raise ConfigError(
            f"evaluation.generalisation.{name}={changes!r} must be a dict of keys of the section data, "
            "and split."
        )
    known, pairs = (*config.data, "split"), []
    for key, value in changes.items():
        if key not in known:
            raise ConfigError(
                f"evaluation.generalisation.{name}.{key} is neither split nor a key of the section data; "
                f"{nearest(key, known)}."
            )
        if key != "split":
            pairs.append((f"data.{key}", str(value)))
    if "name" in changes and "weights" not in changes:
        pairs.append(("data.weights", "none"))  # those of the other data's domains
    return complete_config(ConfigDict(config.to_dict()), pairs)


class Judge:
    """Evaluates a checkpoint on several data sets; programs of the same shapes are compiled once."""

    def __init__(self, numbers: Numbers):
        self._numbers = numbers
        self._steps: dict[Any, EvalStep] = {}
        self._dispatches: dict[Any, Any] = {}

    def step(self, run: setup.Run) -> EvalStep:
        """The compiled evaluation of a run."""
        key = self._key(run)
        if key not in self._steps:
            self._steps[key] = programs.compile_eval_step(run, *self._numbers)
            meet("compiled")
        return self._steps[key]

    def _key(self, run: setup.Run) -> Any:
        batch = jax.tree.leaves(
            jax.tree.map(lambda a: (a.shape, a.dtype), setup.abstract_batch(run))
        )
        return run.spec, tuple(batch), len(run.data.domains)

    def hypotheses(self, run: setup.Run, split: str, batches: int | None) -> dict[int, str] | None:
        """What the model writes on a split; None where the config asks for nothing."""
        decoding = decoding_of(run.config)
        if decoding is None:
            return None
        key = self._key(run)
        if key not in self._dispatches:
            self._dispatches[key] = setup.dispatch_for(run, training=False)
        return decode_split(
            bind(run.skeleton, *self._numbers),
            self._dispatches[key],
            run.data,
            split,
            decoding,
            setup.root_key(run.config.seed, DECODING_KEY),
            batches=batches,
            examples=run.config.evaluation.decode_examples,
        )

    def scores(self, check: Check) -> dict[str, Interval]:
        """Scores on the data of a check."""
        run = check.run
        evaluation, _ = setup.timed_evaluation(
            run, self.step(run), *self._numbers, check.split, limit=check.batches
        )
        assert evaluation.examples is not None
        written = self.hypotheses(run, check.split, check.batches)
        return split_scores(
            run.config.task.name, run.data, check.split, evaluation.examples, written
        )

    def judge(
        self,
        run: setup.Run,
        split: str,
        record: dict[str, Any],
        evaluation: Evaluation,
        checks: list[Check],
    ) -> dict[str, Any]:
        """The entries `triad` and `scores` of a record.

        Args:
            run: that was evaluated.
            split: which was.
            record: of the evaluation.
            evaluation: what the record was made of.
            checks: of `prepare_checks`.
        """
        config, task = run.config, run.config.task.name
        assert evaluation.examples is not None
        written = self.hypotheses(run, split, config.evaluation.batches)
        found = (task, run.data, split, evaluation.examples, written)
        accuracy = split_scores(*found)
        told = triad(
            accuracy,
            cost_of(record, evaluation.examples, config.data.sequence_length),
            {check.name: self.scores(check) for check in checks},
            primary=primary_score(task, config.evaluation.primary),
        )
        entries: dict[str, Any] = {"triad": told}
        if task != "language":  # whose domains are in the record
            by_domain = domain_scores(*found)
            entries["scores"] = {
                name: {score: value.to_json() for score, value in scores.items()}
                for name, scores in by_domain.items()
            }
        return entries
