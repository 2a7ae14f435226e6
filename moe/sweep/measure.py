"""Everything that a comparison tells of one finished run, in one flat dict of numbers.

Losses, load, cost and the causal gap come from what the run has left on disk; saturation takes a
forward pass of two checkpoints over some of the valid text.
"""

import json
from pathlib import Path
import statistics
from typing import Any

from flax import nnx
import jax
import numpy as np

from moe import setup
from moe.config import ConfigDict
from moe.errors import DataError
from moe.evaluation.compare import Numbers, compare, make_comparison_step, saturation_metrics
from moe.model.build import model_size
from moe.model.transformer import Transformer
from moe.report.records import Record, read_metrics
from moe.routing.router import Router
from moe.routing.table import ROUTERS
from moe.setup import Run
from moe.training.checkpoint import Checkpointer
from moe.training.state import abstract_state

COMPARED_BATCHES = 8  # of the valid split, for saturation

# `routing/<name>` of the evaluation -> name in the table
ROUTING = {
    "max_violation": "load_violation",
    "dead_experts": "dead_experts",
    "entropy": "entropy",
    "choices": "choices",
    "causal_gap": "causal_gap",
    "causal_flip_rate": "causal_flip_rate",
}


def measure(config: ConfigDict, workdir: Path, domains: tuple[str | None, str | None]) -> dict:
    """Measures a run that has reached its last step.

    Args:
        config: of the run.
        workdir: of the run.
        domains: of the loss, and of the out-of-domain loss; None: of all text, and none.

    Returns:
        Numbers, None where one does not apply. `loss` is bits per byte, of a classifier nats a row.

    Raises:
        DataError: the last evaluation is missing or damaged.
    """
    path = workdir / "eval" / f"valid-{config.steps}.json"
    record = read_record(path, workdir, domains)
    train = read_metrics(workdir / "metrics.jsonl")[0].get("train", [])
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        run = setup.set_up(config)
        _check_layers(path, workdir, record["metrics"], run.spec.sparse_layers)
        sparse = run.spec.sparse_layers > 0
        saturated = saturation(run, checkpointer) if sparse else None
    return {
        **quality(record, *domains),
        **cost(record, train, run),
        **routing(record, train),
        "saturation": saturated,
    }


def read_record(path: Path, workdir: Path, domains: tuple[str | None, str | None]) -> dict:
    """An evaluation with the numbers that `quality` and `routing` take from it.

    Raises:
        DataError: it is missing, damaged, or lacks one of them.
    """
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, workdir, error) from error
    for domain in domains:
        part = _part(record, "metrics") if domain is None else _part(record, "domains", domain)
        loss = "bits_per_byte" if "bits_per_byte" in part else "loss/cross_entropy"
        for key in (loss, "accuracy"):
            if not _is_number(part.get(key)):
                where = "metrics" if domain is None else f"domain {domain!r}"
                raise _unreadable(path, workdir, f"{key} of its {where} is no number")
    for name in ROUTING:
        if not isinstance(_part(record, "metrics").get(f"routing/{name}"), int | float | None):
            raise _unreadable(path, workdir, f"routing/{name} is no number")
    return record


def _part(record: Any, *keys: str) -> dict[str, Any]:
    """A mapping within a record; an empty one where there is none."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}


def _check_layers(path: Path, workdir: Path, metrics: dict[str, Any], layers: int) -> None:
    """Raises DataError unless `cost` finds a number of every sparse layer."""
    for name in ("choices", "drop_rate") if layers else ():
        found = metrics.get(f"routing/per_layer/{name}")
        if (
            not isinstance(found, list)
            or len(found) != layers
            or not all(_is_number(value) for value in found)
        ):
            raise _unreadable(path, workdir, f"routing/per_layer/{name} is not {layers} numbers")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _unreadable(path: Path, workdir: Path, why: object) -> DataError:
    return DataError(
        f"{path}, the last evaluation of this run, cannot be read ({why}). Make it again with "
        f"`python3 eval.py --workdir={workdir}`, then run the comparison's command again."
    )


def quality(record: dict[str, Any], within: str | None, outside: str | None) -> dict[str, Any]:
    """Loss and accuracy of the text trained on, and of the domain held out."""
    inside = record["metrics"] if within is None else record["domains"][within]
    return {
        "loss": _loss(inside),
        "accuracy": inside["accuracy"],
        "out_of_domain_loss": None if outside is None else _loss(record["domains"][outside]),
    }


def _loss(values: dict[str, float]) -> float:
    """Bits per byte; a classifier's rows have no bytes, so nats a row."""
    return values.get("bits_per_byte", values["loss/cross_entropy"])


def cost(record: dict[str, Any], train: list[Record], run: Run) -> dict[str, Any]:
    """Parameters, FLOPs of a token's forward pass as planned and as executed, tokens/s of training."""
    laps = _numbers(train, "speed/tokens_per_second")
    size = model_size(run.spec, run.config.data.sequence_length)
    flops = executed = size.flops_per_token
    if run.spec.sparse_layers:
        metrics, router = record["metrics"], run.config.router.to_dict()
        kept = _per_layer(metrics, "choices") * (1.0 - _per_layer(metrics, "drop_rate"))
        used = experts_used(ROUTERS[router["name"]], kept, run)
        executed += float((used - router["k"]).sum()) * expert_flops(run)
    return {
        "parameters_total": size.parameters_total,
        "parameters_active": size.parameters_active,
        "flops_per_token": flops,
        "executed_flops": executed,
        # The first lap holds the warming up of caches and threads.
        "tokens_per_second": statistics.median(laps[1:] or laps) if laps else None,
    }


def _numbers(records: list[Record], key: str) -> list[float]:
    return [record[key] for record in records if _is_number(record.get(key))]


def _per_layer(metrics: dict[str, Any], name: str) -> np.ndarray:
    return np.asarray(metrics[f"routing/per_layer/{name}"], np.float64)


def experts_used(router: Router, kept: np.ndarray, run: Run) -> np.ndarray:
    """Experts' compute of one token in each sparse layer, `[L]`.

    Of choices and slots it is what was kept. Soft slots are all computed: slots x E of S tokens.
    A merged expert is computed once a token and made once a segment, which multiplies each of the
    E experts' weights by a number: as much as E tokens in one expert.
    """
    E, S = run.spec.num_experts, run.config.data.sequence_length
    options = run.config.router
    if router.plan == "mixing":
        return np.full_like(kept, options.slots * E / S)
    if router.plan == "merging":
        return np.full_like(kept, 1.0 + E / min(S, options.get("segment", S)))
    return kept


def expert_flops(run: Run) -> float:
    """Of one token in one expert, the mean over experts and layers; 2 a multiply-add."""
    model = nnx.eval_shape(lambda: Transformer(run.spec, rngs=nnx.Rngs(params=0)))
    total = sum(
        float(np.prod(variable.get_value().shape))
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if "experts" in path
    )
    return 2.0 * total / (run.spec.sparse_layers * run.spec.num_experts)


def routing(record: dict[str, Any], train: list[Record]) -> dict[str, Any]:
    """Load and causal gap on the valid split; drops of the last third of training (evaluation has none)."""
    found = {ours: record["metrics"].get(f"routing/{name}") for name, ours in ROUTING.items()}
    drops = _numbers(train, "routing/drop_rate")
    late = drops[len(drops) * 2 // 3 :]
    return found | {"drop_rate": statistics.fmean(late) if late else None}


def saturation(run: Run, checkpointer: Checkpointer) -> float | None:
    """How many choices of the earliest checkpoint kept the last one makes too; None for a single one."""
    steps = sorted(checkpointer.all_steps())
    if len(steps) < 2:
        return None
    now, then = (load_numbers(run, checkpointer, steps[i]) for i in (-1, 0))
    dispatch = setup.dispatch_for(run, training=False)
    step = make_comparison_step(run.skeleton, dispatch, run.token_bytes)
    block = setup.process_block(run.mesh, run.config.data.batch_size)
    with jax.set_mesh(run.mesh):
        sums = compare(
            jax.jit(step),
            now,
            then,
            run.data.eval_batches("valid", *block),
            setup.root_key(run.config.seed, 2),
            to_device=setup.to_device(run.mesh),
            limit=COMPARED_BATCHES,
        )
    return saturation_metrics(sums)["routing/saturation"]


def load_numbers(run: Run, checkpointer: Checkpointer, step: int) -> Numbers:
    """Parameters and router state of a checkpoint."""
    template = abstract_state(run.spec, run.transformation, run.shardings)
    wanted = {"params": template.params, "router": template.router}
    return Numbers(**checkpointer.restore(step, wanted, partial=True).state)
