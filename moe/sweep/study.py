"""The Optuna study of a sweep: filled with its points once, then claimed point by point.

The study holds one trial a point, made when the sweep starts; another is made only where a failed one is
to be run again (`attempts`). A worker claims a trial and holds a lock on its directory, which the kernel
takes back when the worker and the training process it started have both died, however they died. A running
trial whose lock is free is claimed again: the same trial, the same point, the same directory, so that
training goes on from its checkpoints.

Optuna's own heartbeat does not do this: it is for `Study.optimize`, and it makes a new trial, with
another number, for each that went stale.
"""

from collections.abc import Callable, Generator
import contextlib
import fcntl
import os
from pathlib import Path
import socket
import time
from typing import Any, NamedTuple

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, Trial, TrialState

from moe.errors import ConfigError
from moe.sweep.attempts import POINT, first_number, point_trials, retry_failed
from moe.sweep.space import Sweep, fixed_points
from moe.sweep.storage import PATIENCE_SECONDS, PatientStorage, explained, new_token, open_storage

HEARTBEAT_SECONDS = 30.0
# A worker of another workdir or machine, whose locks cannot be seen, is dead after so many
# heartbeats that did not come; it wrote how often they should.
SILENT_BEATS = 10

OWNER = "owner"  # user attribute: workdir and machine of the worker
CLAIM = "claim"  # user attribute: whose the trial is, changed by each who takes it
HEARTBEAT = (
    "heartbeat"  # user attribute: [time, seconds to the next]; changes while the worker lives
)


class ClaimLostError(Exception):
    """Another machine has taken the trial over."""


class Claim(NamedTuple):
    """A trial that this process alone works on, until `lock` is closed or `beat` raises.

    Attributes:
        trial: of the study.
        directory: of its runs.
        lock: open file, locked.
        token: that the trial bears as long as it is ours.
        heartbeat: seconds between two calls of `beat`.
    """

    trial: Trial
    directory: Path
    lock: int
    token: str
    heartbeat: float

    def beat(self) -> None:
        """Tells other machines that this trial's worker lives.

        Raises:
            ClaimLostError: they thought that it did not.
        """
        known = self.trial.storage.get_trial(self.trial._trial_id)
        if known.user_attrs.get(CLAIM) != self.token:
            raise ClaimLostError
        self.trial.set_user_attr(HEARTBEAT, [time.time(), self.heartbeat])


def open_study(sweep: Sweep, storage: str, *, retry: bool = False) -> optuna.Study:
    """Makes or loads the study and sees to it that every point has its trial.

    Args:
        sweep: checked.
        storage: Optuna address.
        retry: whether failed points are to be run again.

    Raises:
        ConfigError: a storage that cannot be opened, or one that holds another sweep of this name.
        ResourceError: a storage that is busy, or on a full disk.
        CheckpointError: a damaged one.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with explained(storage, opening=True):
        study = optuna.create_study(
            study_name=sweep.name,
            storage=open_storage(storage, first=True),
            pruner=_pruner(sweep),
            direction=optuna.study.StudyDirection[sweep.direction.upper()],
            load_if_exists=True,
        )
        _check_same(study, sweep)
        _enqueue_missing(study, sweep)
        if retry:
            retry_failed(study)
    return study


def unfinished(study: optuna.Study) -> int:
    """How many points have no result yet."""
    return sum(not trial.state.is_finished() for trial in point_trials(study))


class Claims:
    """Hands out trials to one worker.

    Args:
        study: from `open_study`.
        workdir: of the sweep; holds `trials/<number>/`.
        local: whether only workers of this workdir use the storage.
        heartbeat: seconds between signs of life of the worker.
    """

    def __init__(
        self,
        study: optuna.Study,
        workdir: Path,
        *,
        local: bool,
        heartbeat: float = HEARTBEAT_SECONDS,
    ):
        self._study, self._heartbeat = study, heartbeat
        self._local = local
        self._trials = workdir / "trials"
        self._trials.mkdir(parents=True, exist_ok=True)
        self._owner = f"{socket.gethostname()}:{_identity(self._trials)}"
        self._seen: dict[int, tuple[Any, float]] = {}

    def next(self) -> Claim | None:
        """An abandoned trial if there is one, else a waiting one; None if there is none now."""
        with _held(self._trials / ".claims"):
            return self._abandoned() or self._waiting()

    def _abandoned(self) -> Claim | None:
        for frozen in point_trials(self._study):
            if frozen.state is not TrialState.RUNNING or not self._is_silent(frozen):
                continue
            lock = self._lock(first_number(frozen))
            if lock is None:
                continue
            claim = self._taken(frozen, lock)
            if claim is not None:
                return claim
        return None

    def _taken(self, seen: FrozenTrial, lock: int) -> Claim | None:
        """The claim of a trial that seemed abandoned, unless another was faster."""
        # Its worker may have finished it between the look and the lock.
        state = self._study.get_trials(deepcopy=False)[seen.number].state
        if not state.is_finished():
            # Optuna has no public way to go on with a trial: `ask` makes its trials like this.
            claim = self._claim(
                Trial(self._study, seen._trial_id), seen, lock, seen.user_attrs.get(CLAIM)
            )
            if claim is not None:
                return claim
        os.close(lock)
        return None

    def _waiting(self) -> Claim | None:
        while self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            trial = self._study.ask()
            counted = {frozen.number: frozen for frozen in point_trials(self._study)}
            if trial.number not in counted:
                # Another machine took the last waiting trial first, or enqueued the point too.
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            frozen = counted[trial.number]
            lock = self._lock(first_number(frozen))
            claim = None if lock is None else self._claim(trial, frozen, lock, None)
            if claim is not None:
                return claim
            if lock is not None:
                os.close(lock)
        return None

    def _claim(
        self, trial: Trial, seen: FrozenTrial, lock: int, before: str | None
    ) -> Claim | None:
        """Makes a trial ours in the database, unless another took it since its claim was `before`."""
        token = new_token()
        backend = getattr(self._study._storage, "_backend", None)  # beneath Optuna's cache
        if not isinstance(backend, PatientStorage):
            raise TypeError(f"a study of {type(backend)} was not made by this module")
        if not backend.swap(trial._trial_id, CLAIM, before, token):
            return None
        trial.set_user_attr(OWNER, self._owner)
        claim = Claim(trial, self._directory(first_number(seen)), lock, token, self._heartbeat)
        claim.beat()
        return claim

    def _is_silent(self, trial: FrozenTrial) -> bool:
        """Whether a running trial may be dead: its lock decides here, its heartbeat elsewhere.

        The silence is measured with this machine's clock alone.
        """
        owner = trial.user_attrs.get(OWNER)
        if owner == self._owner:
            return True
        if owner is None and self._local:
            return True  # died between `ask` and the owner's name; claims are one at a time here
        now, sign = time.monotonic(), trial.user_attrs.get(HEARTBEAT)
        last, since = self._seen.get(trial.number, (None, now))
        if trial.number not in self._seen or last != sign:
            self._seen[trial.number] = sign, now
            return False
        _, every = sign or (None, HEARTBEAT_SECONDS)
        return now - since > SILENT_BEATS * every

    def _directory(self, number: int) -> Path:
        directory = self._trials / str(number)
        directory.mkdir(exist_ok=True)
        return directory

    def _lock(self, number: int) -> int | None:
        descriptor = os.open(self._directory(number) / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor


def default_storage(workdir: Path) -> str:
    """The SQLite file in the workdir."""
    return f"sqlite:///{workdir.absolute() / 'study.db'}"


def suggest(trial: Trial, sweep: Sweep) -> dict[str, Any]:
    """The trial's point; TPE chooses it here from the results so far.

    Seeded by the trial's number, so that a sweep that was killed does not draw its first points again.
    """
    if sweep.sampler == "tpe":
        seed = sweep.sampler_seed + trial.number
        trial.study.sampler = optuna.samplers.TPESampler(seed=seed)
    return {key: _suggest(trial, key, d) for key, d in sweep.space.items()}


def _suggest(trial: Trial, key: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(key, choices)
        case IntDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_int(key, low, high, step=step, log=log)
        case FloatDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_float(key, low, high, step=step, log=log)
    raise TypeError(f"{key}: no way to suggest from {distribution!r}")


def load_study(
    sweep: Sweep,
    storage: str,
    *,
    patience: float = PATIENCE_SECONDS,
    hurry: Callable[[], bool] = lambda: False,
) -> optuna.Study:
    """The study that `open_study` made, for a worker.

    Args:
        sweep: as for `open_study`.
        storage: as for `open_study`.
        patience: seconds that a call waits for a database that is away.
        hurry: asked while waiting; once true, nothing is waited for.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.load_study(
        study_name=sweep.name,
        storage=PatientStorage(storage, patience, hurry),
        pruner=_pruner(sweep),
    )


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    match sweep.pruner:
        case "median":
            return optuna.pruners.MedianPruner()
        case "hyperband":
            return optuna.pruners.HyperbandPruner(
                min_resource=min(sweep.evaluate_every, sweep.steps), max_resource=sweep.steps
            )
        case _:
            return optuna.pruners.NopPruner()


def _check_same(study: optuna.Study, sweep: Sweep) -> None:
    known = study.user_attrs.get("sweep")
    if known is None:
        study.set_user_attr("sweep", sweep.fingerprint())
        return
    for key, value in sweep.fingerprint().items():
        if known.get(key) != value:
            raise ConfigError(
                f"the storage holds a sweep {sweep.name!r} with {key}={known.get(key)!r}, and the "
                f"sweep file now has {key}={value!r}: results of both cannot stand in one table. Take "
                "another --workdir (or another name, in a shared storage), or put the old value back."
            )


def _enqueue_missing(study: optuna.Study, sweep: Sweep) -> None:
    known = {trial.user_attrs[POINT] for trial in point_trials(study)}
    for point, params in enumerate(fixed_points(sweep)):
        if point not in known:
            study.enqueue_trial(params, user_attrs={POINT: point})


def _identity(directory: Path) -> str:
    """A name for the workdir that no copy on another machine has by chance."""
    path = directory / ".identity"
    with _held(directory / ".claims"):
        if not path.exists():
            draft = path.with_name(".identity.tmp")
            draft.write_text(new_token())
            draft.replace(path)
        return path.read_text()


@contextlib.contextmanager
def _held(path: Path) -> Generator[None]:
    """Waits for a lock file and holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
