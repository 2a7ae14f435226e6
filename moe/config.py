"""The config: every key with its default. `config_values` reads and checks values, `config_rules` numbers.

A section is the keyword arguments of one function; `router`, `attention` and `dispatch` are picked by
`name`.
"""

from collections.abc import Iterable, Mapping
import difflib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections

from moe.errors import ConfigError

ConfigDict = ml_collections.ConfigDict


def default_config() -> ConfigDict:
    """Every key with its default. Config files start from here and change what they are about."""
    return ConfigDict(
        {
            "seed": 0,
            "steps": 400,  # optimiser steps
            "log_every": 10,  # steps between lines of metrics.jsonl
            "allow_noncausal": False,  # settings through which a token can see later ones
            "task": {
                # or classify (the label of every row; of text without labels its domain), seq2seq
                # (source to target: a prefix language model), ctc (speech to characters), match
                # (which pairs belong together)
                "name": "language",
                "prefix": "bidirectional",  # or causal: how the source of seq2seq sees itself
                "pool": "mean",  # of a classifier: or segment, learned weights over parts of the row
                # Of pool=segment, see moe/model/segment_pooling.py:
                "size": "ratio",  # or fixed, learned, content
                "segment": 64,  # tokens a segment, of size=fixed
                "ratio": 1 / 3,  # of the row, of size=ratio
                "mixture": "dense",  # or straight_through, of size=learned
                "summary": "mean",  # or last: token of a segment
            },
            "model": {
                "num_layers": 4,
                "width": 128,
                "heads": 4,
                "kv_heads": 4,
                "head_dim": 32,
                "mlp_width": 384,  # hidden width of dense layers
                "expert_width": 192,  # hidden width of one expert
                "num_experts": 8,  # feed-forward ones
                # Others that the router chooses from, beside them (moe/model/mixed_experts.py):
                "conv_experts": 0,
                "zero_experts": 0,
                "copy_experts": 0,
                "constant_experts": 0,
                "conv_kernel": 3,  # positions that a conv expert sees
                "shared_experts": 0,
                "pattern": (
                    "sparse",
                ),  # repeated until num_layers: moe/model/spec.py has the kinds
                "first_dense": 0,  # dense layers before the pattern starts
                "depth_capacity": 0.125,  # share of the tokens that go through a depth layer
                "activation": "swiglu",  # or gelu
                "qk_norm": "none",  # or head, full
                "tie_embeddings": False,
                "dropout": 0.0,
                "logit_softcap": None,
                "rope_base": 10_000.0,
                "norm_eps": 1e-5,
                "remat": "none",  # or full, dots
                "dtype": "float32",  # of computation; parameters are float32
            },
            "router": {"name": "topk", "k": 2, "jitter": 0.0},
            "attention": {"name": "full"},  # moe/model/attention_table.py
            # Layers left out and jumps from earlier ones, in training: moe/model/paths.py.
            "paths": {
                "survival": 1.0,  # probability that the last layer runs
                "schedule": "linear",  # or constant: over layers
                "scope": "batch",  # or sequence: what one draw is for
                "rescale": True,  # divides by the probability, or not (LayerDrop)
                "jump": 0.0,  # probability of each jump
                "jump_mode": "bernoulli",  # or single
                "jump_temperature": 1.0,  # of single
            },
            # On parameters, in training: moe/routing/weight_noise.py.
            "weight_noise": {
                "target": "none",
                "mode": "relative",
                "scale": 0.1,
            },  # or gate, experts
            "dispatch": {
                "name": "grouped",  # or capacity, einsum, reference
                # Of capacity and einsum, see moe/dispatch/capacity.py:
                "capacity_factor": 1.25,  # training; None is dropless
                "eval_capacity_factor": None,
                "priority": "token_major",  # or choice_major, gate, batch, ntlb: not causal
                "group": None,  # positions of a token group; None: the whole row
                "capacity_multiple": 1,  # that slots are rounded up to
                "renormalize": False,  # kept gates take over the mass of dropped ones
                # Between devices, see moe/dispatch/table.py:
                "exchange": "auto",  # or all_to_all, ragged, all_gather
                "buffer_factor": None,  # rows a shard can receive, of balance; None: any skew fits
                "chunks": 1,  # parts of the tokens, one after another, to bound memory
                "backend": "auto",  # of the grouped product: moe/dispatch/grouped_matmul.py
            },
            # Weights, and options of the losses; moe/routing/loss_table.py says what each is.
            "losses": {
                "balance": 0.01,
                "balance_scope": "global",  # or microbatch, sequence
                "balance_counts": "all",  # or first: only the first choice of each token
                "sequence_balance": 0.0,
                "z": 0.001,
                "importance": 0.0,
                "load": 0.0,
                "device_balance": 0.0,
                "device_balance_scope": "sequence",
                "communication_balance": 0.0,
                "communication_balance_scope": "sequence",
                "mutual_information": 0.0,
                "entropy": 0.0,
                "modality_local": 0.0,
                "modality_global": 0.0,
                "modality_global_experts": 0.0,
                "simbal": 0.0,
                "orthogonality": 0.0,
                "heterogeneous": 0.0,
                "heterogeneous_tau": 0.75,
                "heterogeneous_factor": 1.0,
                "relu_l1": 0.0,
                "relu_balance": 0.0,
                "relu_balance_scope": "microbatch",
                "selector_entropy": 0.0,
                "selector_outside": 0.0,
                "group_balance": 0.0,
                "group_balance_scope": "global",
                "within_group_balance": 0.0,
                "within_group_balance_scope": "global",
                "consistency": 0.0,
                "policy": 0.0,
                "policy_credit": "token",
                "policy_penalty": 0.0,
                "policy_baseline_weight": 1.0,
                "policy_entropy": 0.0,
                "compute": 0.0,
                "compute_target": 0.0,
                "compute_kind": "squared",
                "predictor": 0.0,
                "commitment": 0.0,
                "head_balance": 0.0,
            },
            "data": {
                "name": "stdlib",
                "batch_size": 16,  # sequences of the global batch
                "sequence_length": 256,
                "tokenizer": "bytes",  # or bpe, characters
                "vocab_size": None,  # of bpe and characters
                "weights": None,  # domain -> weight; None is proportional to size
                "files": None,  # glob, or domain -> glob
                "text_feature": "text",
                "directory": None,  # of prepared data; None is TFDS's default
                # Of tasks that read examples, see moe/data/example_data.py:
                "input_feature": None,  # None: the task's usual one
                "target_feature": None,
                "label_feature": "label",
                "patch": 4,  # side of the patches of a picture, pixels
                "stride": None,  # between patches; None: patch
                "sample_rate": None,  # of sound, a second; None: that of the data set
                "mels": 40,  # bands of log-mel frames
                "too_long": "truncate",  # or skip, error: examples that a row does not hold
                "workers": 0,  # processes that read; 0: threads
                "skip_bad": 0,  # bad records that may be left out of a split
                "corrupt": None,  # kind:severity of inputs, moe/data/corrupt.py
            },
            "optimizer": {
                "learning_rate": 3e-3,
                "schedule": "cosine",  # or wsd, constant
                "warmup_steps": 40,
                "decay_fraction": 0.2,  # of all steps, for wsd
                "final_fraction": 0.1,  # of the peak learning rate
                "weight_decay": 0.1,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "moment_dtype": "float32",  # or bfloat16: half of the memory of Adam's moments
                "clip_norm": 1.0,
                "accumulation": 1,  # microbatches a step
            },
            # Sizes of the axes (moe/parallel/mesh.py), and where parameters lie (moe/parallel/rules.py).
            "mesh": {
                "data": -1,  # one size may be -1: what is left of the devices
                "fsdp": 1,
                "expert": 1,
                "sequence": 1,
                "tensor": 1,
                "slices": 1,  # that a slow network joins; data crosses it
                "rules": "separate",  # or folded, folded_data, hybrid, zero1
            },
            "checkpoint": {"every": 100, "keep_latest": 2, "keep_best": 1},
            # What is not learned from, and when a run gives up: docs/reliability.md.
            "guards": {
                "bad_steps": 10,  # in a row with a loss or gradients that are not finite: exit 5
                "spike_sigmas": 6.0,  # above the mean of recent losses: skipped; None: never
                "window": 128,  # recent losses; nothing is a spike before there are so many
                "spikes": 3,  # in a row: back to a checkpoint, and past the batches
                "skip_batches": 100,  # from the one that spiked first
                "rewinds": 2,  # of a run, then exit 5
                # Beyond these in so many evaluations in a row, a warning:
                "dead_experts": 0.5,  # share of the experts of a layer that get no token
                "violation": 5.0,  # largest load over the mean load, less 1
                "evaluations": 3,
            },
            "evaluation": {
                "every": 100,
                "batches": None,  # None: the whole split
                "passes": 1,  # draws of routers that sample in evaluation, averaged
                "primary": None,  # metric that is reported first; None: the task's usual one
                "decode": "none",  # or greedy, beam, sample: what seq2seq writes is scored too
                "decode_length": 64,  # new tokens at most
                "decode_examples": None,  # at most; None: the whole split
                "beam": 4,
                "length_penalty": 0.6,  # of beam
                "train_gap": 8,  # batches of train that eval.py compares with; 0: none
                # name -> overrides of `data`, and `split`: other data that eval.py reports on
                "generalisation": {},
            },
            # Of routers with a prior over experts; moe/training/prior_update.py.
            "prior": {
                "every": 0,  # steps between updates from the router-validation split; 0: never
                "rate": 0.1,
                "floor": 0.05,  # share of the uniform prior mixed in
                "batches": 2,  # of the split, an update
                "reward": "ablation",
            },
        }
    ).lock()


def import_beside(file: str, name: str) -> ModuleType:
    """The module in the file `name` in the folder of `file`, wherever a program runs from.

    Config files are run by path and belong to no package, so that they cannot import each other.

    Args:
        file: `__file__` of the config.
        name: as `models.py`, or `presets/random.py`.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(file).parent / name
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{file} needs {path}, which is no Python file: copy it there.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dotted_keys(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterable[str]:
    """All keys that hold a value, as `section.key`."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"  # a config file may have numbers for keys


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint with the nearest of the valid words."""
    words = sorted(words)
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
    return f"the nearest is {match[0]!r}" if match else "there is none"


def replace_section(config: ConfigDict, name: str, values: Mapping[str, Any]) -> None:
    """Gives a section other keys (another router has other options)."""
    with config.unlocked():
        config[name] = ConfigDict(dict(values)).lock()


def require(condition: bool, message: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)
