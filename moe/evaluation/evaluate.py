"""Evaluation of a whole split, exact on any number of devices: sums first, quotients at the end."""

from collections.abc import Callable, Iterable
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from moe.data.types import Batch
from moe.dispatch.types import Dispatch
from moe.evaluation import examples, routing_sums
from moe.evaluation.compare import Comparison, causal_metrics, comparison
from moe.evaluation.examples import Examples
from moe.evaluation.kept_choices import kept_rows
from moe.evaluation.parameter_similarity import similarity_metrics, sparse_layers
from moe.evaluation.routing_paths import prior_entropy
from moe.evaluation.routing_sums import RoutingSums
from moe.model.layer import Call
from moe.routing import metrics
from moe.training.objective import Forward, RowSums, forward
from moe.training.state import Skeleton


class EvalSums(NamedTuple):
    """Sums over batches. Leading axis `M`: text domains."""

    rows: RowSums  # each [M]
    totals: metrics.Totals | None  # None for a dense model
    domain_requested: Float[Any, "L M E"] | None  # choices by domain, before drops
    routing: RoutingSums | None = None
    causal: Comparison | None = None  # with the form of training, where it was asked for
    layer_terms: dict[str, Any] = {}  # noqa: RUF012 - of the layers themselves, over valid tokens
    valid: Any = 0.0  # tokens that are not padding


class Sample(NamedTuple):
    """A row of text and where its tokens went."""

    tokens: Int[np.ndarray, " S"]
    experts: Int[np.ndarray, "L S K"]
    domain: int


class Evaluation(NamedTuple):
    """What one evaluation found; keys as in metrics.jsonl."""

    metrics: dict[str, Any]
    domains: dict[str, dict[str, float]]
    domain_load: dict[str, list[list[float]]]
    sample: Sample | None
    tables: dict[str, Any] = {}  # noqa: RUF012 - `routing/<name>`, see `routing_sums.summarize`
    choices: Int[np.ndarray, "L R S K"] | None = None  # of the first rows; None for a dense model
    visits: Float[np.ndarray, "L E"] | None = None  # kept choices for each token of the text
    examples: Examples | None = None  # every row


class Evaluated(NamedTuple):
    """What one batch gives."""

    sums: EvalSums
    examples: Examples
    experts: Int[Array, "L R S K"] | None  # of the first rows; None for a dense model


class EvaluationStopped(Exception):
    """The run was asked to stop between two batches of an evaluation, which has found nothing."""


EvalStep = Callable[[Any, Any, Batch, Key[Array, ""]], Evaluated]


def make_eval_step(
    skeleton: Skeleton,
    dispatch: Dispatch,
    token_bytes: Int[Array, " V"],
    domains: int,
    *,
    passes: int = 1,
    vocabulary: bool = False,
    next_token: bool = True,
    causal_gap: bool = False,
) -> EvalStep:
    """Builds `(params, router state, batch, key) -> Evaluated`; jit it.

    `key` is used by routers that draw their choices; no other noise is on in evaluation.

    Args:
        skeleton: the model without its numbers.
        dispatch: how tokens reach experts.
        token_bytes: bytes that each id stands for.
        domains: `M`.
        passes: draws of the routers whose predictions are averaged, as an ensemble.
        vocabulary: counts the choices of every token id too, `[L V E]`.
        next_token: whether logits are of the next token, whose ids are then counted as well.
        causal_gap: runs the form of training too, for routers whose form of evaluation alone is
            causal.
    """

    def run(params: Any, router: Any, batch: Batch, **how: Any) -> Forward:
        call = Call(batch.tokens, batch.valid, dispatch, **how)
        return forward(skeleton, params, router, batch, call, token_bytes, passes)

    def step(params: Any, router: Any, batch: Batch, key: Key[Array, ""]) -> Evaluated:
        done = run(params, router, batch, key=key)
        report = done.reports
        member = jax.nn.one_hot(batch.domain, domains)  # [B M]
        by_domain = RowSums(*(jnp.einsum("b,bm->m", x, member) for x in done.rows))
        terms = {name: jnp.where(batch.valid, v, 0.0).sum() for name, v in done.terms.items()}
        if report is None:
            sums = EvalSums(by_domain, None, None, None, None, terms, batch.valid.sum())
            return Evaluated(sums, _examples(done, batch), None)
        requested = jnp.einsum("lbe,bm->lme", report.row_requested, member)
        logits = done.logits if vocabulary and next_token else None
        counted = token_bytes.shape[0] if vocabulary else None
        routing = routing_sums.routing_sums(report, batch, member, key, logits, counted)
        causal = None
        if causal_gap:
            causal = comparison(done, run(params, router, batch, key=key, training=True))
        totals = metrics.totals(report)
        sums = EvalSums(by_domain, totals, requested, routing, causal, terms, batch.valid.sum())
        experts = report.expert[:, : kept_rows(*batch.tokens.shape)]
        return Evaluated(sums, _examples(done, batch), experts)

    return step


def _examples(done: Forward, batch: Batch) -> Examples:
    """What is kept of every row: few numbers, but for the path of a row that is aligned."""
    rows, logits = done.rows, done.logits
    index = jnp.zeros_like(batch.domain) if batch.index is None else batch.index
    found = Examples(index, batch.domain, rows.nll, rows.correct, rows.tokens, rows.bytes)
    if done.pair is not None:
        return found._replace(embedding=done.pair)
    assert logits is not None
    if logits.ndim == 2:
        label = batch.domain if batch.label is None else batch.label
        return found._replace(label=label, prediction=logits.argmax(axis=-1).astype(jnp.int32))
    if done.path is not None:
        return found._replace(prediction=done.path, valid=batch.valid)
    return found


def evaluate(
    eval_step: EvalStep,
    params: Any,
    router: Any,
    batches: Iterable[Batch],
    key: Key[Array, ""],
    *,
    domains: tuple[str, ...],
    to_device: Callable[[Batch], Batch],
    limit: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Runs over the batches and divides the sums.

    Args:
        eval_step: jitted `make_eval_step(...)`.
        params: pure dict of parameters.
        router: pure dict of router state; not changed.
        batches: this process's part of each global batch; padding rows are not valid.
        key: the same for every evaluation of a run; batch `i` folds in `i`.
        domains: names by domain index.
        to_device: makes the global batch of this process's part.
        limit: batches at most; None is the whole split.
        stop: asked between two batches, equally often by every process; must be the same on all.

    Returns:
        Cross-entropy in nats a token and the rest, over all domains and for each.

    Raises:
        EvaluationStopped: `stop` said so.
    """
    sums, sample, choices, rows = None, None, None, []
    for index, local in enumerate(itertools.islice(batches, limit)):
        if index and stop is not None and stop():
            raise EvaluationStopped(f"The evaluation was stopped after {index} batches.")
        found = eval_step(params, router, to_device(local), jax.random.fold_in(key, index))
        done, experts = _to_host(found.sums), found.experts
        rows.append(examples.collect(found.examples))
        sums = done if sums is None else _add(sums, done)
        if choices is None and experts is not None:
            choices = np.asarray(experts)
            sample = Sample(np.asarray(local.tokens[0]), choices[:, 0], int(local.domain[0]))
    assert sums is not None
    found = summarize(sums, domains)
    numbers = similarity_metrics(params) | prior_metrics(router)
    return found._replace(
        metrics=found.metrics | numbers,
        sample=sample,
        choices=choices,
        examples=examples.join(rows),
    )


def prior_metrics(router: Any) -> dict[str, Any]:
    """`routing/prior_entropy` in nats, of routers whose state has a `log_prior`; else nothing."""
    states = [layer.get("state", {}) for layer in sparse_layers(router, "state")]
    if not states or "log_prior" not in states[0]:
        return {}
    log_prior = np.stack([jax.device_get(state["log_prior"]) for state in states], axis=1)
    layers = prior_entropy(np.exp(np.asarray(log_prior, np.float64))).reshape(-1)
    return {
        "routing/prior_entropy": float(layers.mean()),
        "routing/per_layer/prior_entropy": layers.tolist(),
    }


def _to_host(sums: EvalSums) -> EvalSums:
    host = jax.tree.map(
        lambda a: np.asarray(a, np.float64), jax.device_get(sums._replace(routing=None))
    )
    if sums.totals is None or sums.routing is None:
        return host
    return host._replace(
        totals=metrics.collect(sums.totals), routing=routing_sums.collect(sums.routing)
    )


def _add(a: EvalSums, b: EvalSums) -> EvalSums:
    added = jax.tree.map(np.add, a._replace(routing=None), b._replace(routing=None))
    if a.totals is None or b.totals is None or a.routing is None or b.routing is None:
        return added
    return added._replace(
        totals=metrics.add(a.totals, b.totals), routing=routing_sums.add(a.routing, b.routing)
    )


def summarize(sums: EvalSums, domains: tuple[str, ...]) -> Evaluation:
    """Quotients of host sums."""
    values = quality(RowSums(*(np.sum(x) for x in sums.rows)))
    tokens = max(float(sums.valid), 1.0)
    values |= {f"layers/{name}": float(v) / tokens for name, v in sums.layer_terms.items()}
    by_domain, load, tables = {}, {}, {}
    for i, name in enumerate(domains):
        part = RowSums(*(x[i] for x in sums.rows))
        if part.tokens > 0:
            by_domain[name] = quality(part)
    if sums.totals is not None and sums.domain_requested is not None:
        values |= metrics.summarize(sums.totals)
        if sums.routing is not None:
            found, tables = routing_sums.summarize(sums.routing, sums.domain_requested)
            values |= found
        if sums.causal is not None:
            values |= causal_metrics(sums.causal)
        for i, name in enumerate(domains):
            if name in by_domain:
                load[name] = metrics.load(np.asarray(sums.domain_requested)[:, i]).tolist()
    visits = None if sums.totals is None else np.asarray(sums.totals.kept) / tokens
    return Evaluation(values, by_domain, load, None, tables, visits=visits)


def quality(rows: RowSums) -> dict[str, float]:
    """Cross-entropy, perplexity, bits per byte and accuracy of summed rows.

    The targets of a classifier stand for no bytes: bits per byte are left out.
    """
    nll = float(rows.nll)
    tokens, sizes = max(float(rows.tokens), 1.0), float(rows.bytes)
    cross_entropy = nll / tokens
    found = {
        "loss/cross_entropy": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, 700.0)),
        "accuracy": float(rows.correct) / tokens,
        "tokens": float(rows.tokens),
    }
    return found | ({"bits_per_byte": nll / math.log(2) / sizes} if sizes > 0 else {})


class BestRule(NamedTuple):
    """How the best checkpoint is told from the others."""

    metric: str
    mode: str  # min or max


def best_rule(task: str) -> BestRule:
    """How the best checkpoint of a task is told.

    Where whole rows are judged it is by accuracy: their cross-entropy rises with confidence long before
    their ranking gets worse.
    """
    if task in ("classify", "match"):
        return BestRule("accuracy", "max")
    return BestRule("bits_per_byte" if task == "language" else "loss/cross_entropy", "min")
