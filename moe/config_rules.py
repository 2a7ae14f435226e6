"""The rules of the config that need nothing but its numbers: ranges, names, and what must divide what."""

import math
from typing import Any

from moe.config import ConfigDict, dotted_keys, require


def check_numbers(config: ConfigDict) -> None:
    """Checks every rule that needs nothing but the config itself.

    Raises:
        ConfigError: names the key, its value, the rule and the fix.
    """
    _check_sizes(config)
    _check_mappings(config)
    _check_positive(config)
    _check_names(config)
    m, data = config.model, config.data
    layers = m.num_layers - m.first_dense
    require(
        m.first_dense <= m.num_layers and layers % len(m.pattern) == 0,
        f"model.num_layers={m.num_layers} less model.first_dense={m.first_dense} leaves {layers} layers, "
        f"which the pattern {m.pattern} of length {len(m.pattern)} does not fill: change num_layers to "
        f"{m.first_dense + len(m.pattern) * max(1, layers // len(m.pattern))}.",
    )
    require(
        m.heads % m.kv_heads == 0,
        f"model.heads={m.heads} is no multiple of model.kv_heads={m.kv_heads}: every key/value head "
        "serves the same number of query heads. Choose kv_heads among the divisors of heads.",
    )
    d = config.dispatch
    require(
        config.allow_noncausal
        or config.task.name not in CAUSAL_TASKS
        or d.name not in ("capacity", "einsum")
        or d.priority == "token_major",
        f"dispatch.priority={d.priority!r} does not seat tokens in their order, so a later token can push "
        "out an earlier one: a causal model would see its future. Use 'token_major', or set "
        "allow_noncausal=True and mistrust the loss.",
    )
    _check_tasks(config)
    require(m.head_dim % 2 == 0, f"model.head_dim={m.head_dim} must be even for rotary positions.")
    accumulation = config.optimizer.accumulation
    require(
        data.batch_size % accumulation == 0,
        f"data.batch_size={data.batch_size} is not divisible by optimizer.accumulation={accumulation}: "
        "every microbatch has the same number of sequences.",
    )


def _check_tasks(config: ConfigDict) -> None:
    """What one task alone can do."""
    name, accumulation = config.task.name, config.optimizer.accumulation
    require(
        name != "match" or accumulation == 1,
        f"optimizer.accumulation={accumulation} with task.name='match': each pair is told from all other "
        "pairs of the batch, so microbatches would be another, easier task. Set optimizer.accumulation=1.",
    )
    require(
        name != "match" or config.losses.consistency == 0,
        f"losses.consistency={config.losses.consistency} with task.name='match', which predicts no "
        "distribution of its own for a row. Set losses.consistency=0.",
    )
    passes = config.evaluation.passes
    require(
        name != "match" or passes == 1,
        f"evaluation.passes={passes} with task.name='match': its vectors are not averaged over draws. "
        "Set evaluation.passes=1.",
    )
    require(
        name == "seq2seq" or config.evaluation.decode == "none",
        f"evaluation.decode={config.evaluation.decode!r} with task.name={name!r}: only seq2seq writes "
        "targets. Set evaluation.decode='none'.",
    )


CAUSAL_TASKS = ("language", "seq2seq")  # whose tokens must not see later ones
POSITIVE = (
    "steps log_every model.num_layers model.width model.heads model.kv_heads model.head_dim model.mlp_width "
    "model.expert_width model.num_experts router.k data.batch_size data.sequence_length "
    "optimizer.accumulation checkpoint.every checkpoint.keep_latest evaluation.every evaluation.passes "
    "model.conv_kernel model.rope_base model.norm_eps optimizer.clip_norm optimizer.eps prior.batches "
    "dispatch.capacity_multiple dispatch.chunks data.patch data.mels evaluation.decode_length "
    "evaluation.beam guards.bad_steps guards.window guards.spikes guards.evaluations"
).split()
POSITIVE_OR_NONE = (
    "model.logit_softcap dispatch.capacity_factor dispatch.eval_capacity_factor evaluation.batches "
    "dispatch.group dispatch.buffer_factor data.stride data.sample_rate evaluation.decode_examples "
    "guards.spike_sigmas"
).split()
BELOW_ONE = "model.dropout optimizer.b1 optimizer.b2 prior.floor".split()
NOT_NEGATIVE = (
    "seed model.shared_experts model.first_dense router.jitter "
    "model.conv_experts model.zero_experts model.copy_experts model.constant_experts "
    "optimizer.learning_rate optimizer.warmup_steps optimizer.weight_decay checkpoint.keep_best "
    "optimizer.final_fraction optimizer.decay_fraction"
    " model.dropout optimizer.b1 optimizer.b2 prior.every prior.rate prior.floor data.skip_bad"
    " evaluation.train_gap evaluation.length_penalty data.workers guards.skip_batches guards.rewinds"
    " guards.dead_experts guards.violation"
).split()
# Kinds of layers: double has two sparse parts in a row; only some tokens go through those of depth.
BLOCKS = ("dense", "sparse", "double", "depth", "depth_sparse")
ONE_OF = {
    "model.activation": ("swiglu", "gelu"),
    "model.qk_norm": ("none", "head", "full"),
    "model.remat": ("none", "full", "dots"),
    "model.dtype": ("float32", "bfloat16"),
    "task.name": ("language", "classify", "seq2seq", "ctc", "match"),
    "task.prefix": ("bidirectional", "causal"),
    "losses.balance_scope": ("sequence", "microbatch", "global"),
    "losses.balance_counts": ("all", "first"),
    "dispatch.name": ("grouped", "capacity", "einsum", "reference"),
    "dispatch.priority": ("token_major", "choice_major", "gate", "batch", "ntlb"),
    "dispatch.exchange": ("auto", "all_to_all", "ragged", "all_gather"),
    "data.tokenizer": ("bytes", "bpe", "characters"),
    "data.too_long": ("truncate", "skip", "error"),
    "evaluation.decode": ("none", "greedy", "beam", "sample"),
    "prior.reward": ("ablation",),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
}


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


# Beyond these a number means another one, or is built in memory before anything can be said of it.
AT_MOST = {
    "seed": 2**32 - 1,  # JAX takes the lower 32 bits
    "model.num_layers": 10_000,
    "data.workers": 1_000,
    "evaluation.passes": 10_000,
}
_LARGEST = 2**31 - 1  # of every other whole number: sizes and steps are int32 on devices


def _check_sizes(config: ConfigDict) -> None:
    for key in dotted_keys(config):
        if key.startswith(("data.weights.", "data.files.", "evaluation.generalisation.")):
            continue  # keys of the user's own, which may have dots
        value, most = _get(config, key), AT_MOST.get(key, _LARGEST)
        if isinstance(value, int):
            require(abs(value) <= most, f"{key}={value} is too large: at most {most}.")
        if isinstance(value, str):
            require("\0" not in value, f"{key}={value!r} has a NUL character, which no name has.")


def _check_mappings(config: ConfigDict) -> None:
    """What stands below keys of the user's own."""
    for key, kinds, what in (
        ("data.files", str, "a glob"),
        ("data.weights", int | float, "a number"),
        ("evaluation.generalisation", ConfigDict | dict, "a mapping of overrides"),
    ):
        found = _get(config, key)
        if isinstance(found, ConfigDict | dict):
            for name, value in found.items():
                require(
                    isinstance(value, kinds) and not isinstance(value, bool),
                    f"{key}: {name!r} is {value!r}, and must be {what}.",
                )


def _check_positive(config: ConfigDict) -> None:
    for key in POSITIVE:
        value = _get(config, key)
        require(value > 0, f"{key}={value} must be greater than 0.")
    for key in POSITIVE_OR_NONE:
        value = _get(config, key)
        require(value is None or value > 0, f"{key}={value} must be greater than 0, or None.")
    for key in BELOW_ONE:
        value = _get(config, key)
        require(value < 1, f"{key}={value} must be less than 1.")
    weights = [f"losses.{n}" for n, v in config.losses.items() if isinstance(v, float)]
    for key in [*NOT_NEGATIVE, *weights]:
        value = _get(config, key)
        require(value >= 0, f"{key}={value} must not be negative.")
    for key in [*POSITIVE, *POSITIVE_OR_NONE, *NOT_NEGATIVE, *weights]:
        require(_get(config, key) != math.inf, f"{key}=inf must be finite.")


def _check_names(config: ConfigDict) -> None:
    for key, valid in ONE_OF.items():
        value = _get(config, key)
        require(value in valid, f"{key}={value!r} is none of {', '.join(valid)}.")
    pattern = config.model.pattern
    require(
        len(pattern) > 0 and all(kind in BLOCKS for kind in pattern),
        f"model.pattern={pattern} must be a non-empty sequence of {', '.join(map(repr, BLOCKS))}.",
    )
