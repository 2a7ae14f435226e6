"""The trials of a point: its first, and one more each time that a failed one is run again.

A failed trial stays as it ended, with its error. The next attempt is a trial of its own, with the same
point and in the same directory, so that training goes on from the checkpoints there. The two are linked by
the attributes that Optuna's `RetryHeartbeatStaleTrialCallback` gives its own; its `retry_history` reads ours.
"""

import optuna
from optuna.trial import FrozenTrial, TrialState

POINT = "point"  # user attribute: which point of the sweep a trial is
ERROR = "error"  # user attribute: why a trial failed
SEEDS = "seeds"  # user attribute: seed -> {"value": float, "curve": [[step, value], ...]}
FIRST = "failed_trial"  # system attribute of Optuna: number of the point's first trial
HISTORY = "retry_history"  # system attribute of Optuna: numbers of all attempts before this one
FIXED = "fixed_params"  # system attribute of Optuna: the point of a trial that was enqueued


def first_number(trial: FrozenTrial) -> int:
    """The number of the point's first trial, which names the directory of all its attempts."""
    return trial.system_attrs.get(FIRST, trial.number)


def earlier_numbers(trial: FrozenTrial) -> list[int]:
    """The numbers of the attempts before this one, all of which failed."""
    return list(trial.system_attrs.get(HISTORY, []))


def point_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The newest attempt at each point, in the order of the points.

    Two machines that start one sweep at the same moment, or run its failed points again, may both enqueue
    a point: the first trial counts.
    """
    newest: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if POINT not in trial.user_attrs:
            continue
        point = trial.user_attrs[POINT]
        known = newest.get(point)
        follows = [] if known is None else [*earlier_numbers(known), known.number]
        if earlier_numbers(trial) == follows:
            newest[point] = trial
    return [newest[point] for point in sorted(newest)]


def retry_failed(study: optuna.Study) -> int:
    """Enqueues every failed point once more, with its parameters and the seeds it has; says how many."""
    failed = [trial for trial in point_trials(study) if trial.state is TrialState.FAIL]
    for trial in failed:
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                # Of a seed that is done, nothing is reported again: pruners compare others with these.
                intermediate_values=trial.intermediate_values,
                user_attrs={k: v for k, v in trial.user_attrs.items() if k in (POINT, SEEDS)},
                system_attrs={
                    FIXED: trial.system_attrs.get(FIXED, {}),
                    FIRST: first_number(trial),
                    HISTORY: [*earlier_numbers(trial), trial.number],
                },
            )
        )
    return len(failed)
