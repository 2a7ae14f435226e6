"""Back to a checkpoint from before a row of loss spikes, and past the batches that spiked.

A loss that stays up once a few updates were skipped comes from the weights: train again from an older
checkpoint, on other data (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1). All here are pure
functions of the guard's counters, the events of `history.jsonl` and the place in the data; so the same
history and the same checkpoint give the same continuation, on every process.

A run goes back to the same checkpoint and on at the same row however seldom the loop looks: a row of
spikes, once complete, lasts until the run goes back (`guards.is_spike`), so that what is found is what
was to be found at the step that completed it. `log_every` changes no bit of the state that a run ends
with; it only decides how many steps are thrown away.

What the loop must do, in this order:

1. `verdict` at every step with a log line, an evaluation or a save that is due, after the step and
   before its save. At a save out of turn (an interruption) only "end" is heeded: the next start finds
   "rewind" as well, and goes back then.
2. "go_on": nothing. "end": save nothing, raise DivergedError with `why`.
3. "rewind", after step `n` with `row` rows consumed:
   a. `first = first_of_row(guard, n)`, `to = go_back_to(all_steps(), first, every)`.
   b. `retire_after(to)`; records and kept choices after `to` go too.
   c. The newest checkpoint is restored as at a start: step `s` with `next_row` (a damaged one is passed
      over; a fresh state, 0 and 0, where there is none).
   d. `event = plan(events, s, next_row, ...)`; process 0 appends it to the history, and every process
      to its own `events`. Only now, when no newer checkpoint is left: were it written before, a run
      killed in between would find the row of spikes again with its budget spent.
4. After every restore, that of 3c and that of any start: `row = resume_row(events, s, next_row)`. If it
   is not `next_row`, the data goes on at `row`, and the guard forgets its row of steps without an
   update (`guards.rested`). Then on with step `s + 1`.

Killed anywhere in 3, the next start finds either no event, trains from `s` into the same spikes and
comes to the same verdict, or the event, and goes on where the rewind would have.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from moe.config import ConfigDict
from moe.training.guards import GuardState

EVENT = "rewind"
Events = Sequence[dict[str, Any]]
Verdict = Literal["go_on", "rewind", "end"]


def verdict(guard: GuardState, limits: ConfigDict, events: Events = ()) -> Verdict:
    """Whether a run goes on after a step.

    Args:
        guard: after the step, on the host or on devices.
        limits: `config.guards`.
        events: of `history.jsonl`, whose rewinds count against `limits.rewinds`.
    """
    if is_beyond(guard, limits):
        return "end"
    if int(guard.spikes_in_a_row) < limits.spikes:
        return "go_on"
    return "rewind" if len(rewinds(events)) < limits.rewinds else "end"


def is_beyond(guard: GuardState, limits: ConfigDict) -> bool:
    """Whether so many steps in a row were not finite that nothing may be saved any more.

    Args:
        guard: after the step.
        limits: `config.guards`.
    """
    return int(guard.longest_bad) >= limits.bad_steps


def why(guard: GuardState, limits: ConfigDict, step: int, newest: int | None) -> str:
    """For people: why the verdict is "end", and what to do.

    Args:
        guard: after the step.
        limits: `config.guards`.
        step: after which the verdict was found.
        newest: step of the newest checkpoint; None if there is none.
    """
    if is_beyond(guard, limits):
        cause = (
            f"the loss, the gradients or the update were not finite in {int(guard.longest_bad)} steps in a row "
            f"(guards.bad_steps={limits.bad_steps})"
        )
    else:
        step -= lateness(guard, limits)
        cause = (
            f"the loss spiked in {limits.spikes} steps in a row (guards.spikes={limits.spikes}) and all "
            f"guards.rewinds={limits.rewinds} rewinds are used up"
        )
    kept = "No checkpoint was saved before" if newest is None else f"Checkpoint {newest} is kept"
    return (
        f"Training diverged at step {step}: {cause}. None of these steps changed the weights. {kept}. Lower "
        "optimizer.learning_rate or optimizer.clip_norm, lengthen optimizer.warmup_steps, or look at the "
        "data of these steps; then start in another workdir, or go on in this one."
    )


def rewinds(events: Events) -> list[dict[str, Any]]:
    """The rewinds of a run, oldest first; one that was written twice counts once."""
    found = []
    for event in events:
        if event["event"] == EVENT and event not in found:
            found.append(event)
    return found


def lateness(guard: GuardState, limits: ConfigDict) -> int:
    """How many steps ago the row of spikes was complete; 0 where it is not.

    Args:
        guard: after the step.
        limits: `config.guards`.
    """
    return max(0, int(guard.spikes_in_a_row) - limits.spikes)


def first_of_row(guard: GuardState, step: int) -> int:
    """The first of the steps without an update that end with `step`; `step + 1` if it had one."""
    return step + 1 - int(guard.spikes_in_a_row) - int(guard.bad_in_a_row)


def go_back_to(steps: Iterable[int], first: int, every: int) -> int:
    """The checkpoint to train again from.

    The newest before the first spike, of those that are saved in turn if there is one: a run that
    was interrupted goes back as far as one that was not. Before the first of them, and where there
    is none at all, 0: a fresh state. Where all that are left are from within the row of spikes or
    after it, the oldest: its weights are those from before.

    Args:
        steps: of all checkpoints.
        first: step of the first spike of the row.
        every: `config.checkpoint.every`.
    """
    if first <= every:
        return 0
    steps = sorted(steps)
    before = [step for step in steps if step < first]
    in_turn = [step for step in before if step % every == 0]
    for found in (in_turn[-1:], before[-1:], steps[:1]):
        if found:
            return found[0]
    return 0


def plan(
    events: Events,
    step: int,
    next_row: int,
    *,
    guard: GuardState,
    row: int,
    batch_size: int,
    limits: ConfigDict,
) -> dict[str, Any]:
    """The event of a rewind, to be appended to the history.

    It skips `limits.skip_batches` batches from the first that spiked, at least all until the row was
    complete, and what lies between the checkpoint and them. It always leads on, by one batch at least:
    a checkpoint that was saved out of turn after the row was complete, and is the only one, is already
    past them.

    Args:
        events: of the history.
        step: of the checkpoint that was restored.
        next_row: rows of the data consumed in it.
        guard: where the verdict was "rewind".
        row: rows consumed there.
        batch_size: rows a step; those of steps before a restart with another size count as of this one.
        limits: `config.guards`.
    """
    late = lateness(guard, limits)
    spiked = int(guard.spikes_in_a_row) + int(guard.bad_in_a_row) - late
    skipped = max(spiked, limits.skip_batches)
    start = resume_row(events, step, next_row)
    resume = max(start + batch_size, row + (skipped - spiked - late) * batch_size)
    return {"event": EVENT, "step": step, "next_row": start, "resume_row": resume}


def resume_row(events: Events, step: int, next_row: int) -> int:
    """The row at which a restored run goes on, after all rewinds that went back to this checkpoint.

    Args:
        events: of the history, oldest first.
        step: of the checkpoint.
        next_row: rows of the data consumed in it.
    """
    for event in rewinds(events):
        if event["step"] == step and event["next_row"] == next_row:
            next_row = event["resume_row"]
    return next_row
