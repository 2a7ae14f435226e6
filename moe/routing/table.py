"""The table of routers: a new one is a file, a row here, and nothing else."""

from typing import Any

from moe.errors import ConfigError, did_you_mean, find_row
from moe.routing import (
    balanced_groups,
    base,
    bernoulli,
    bigram_hash,
    cosine,
    deepseek_v2,
    deepseek_v3,
    document_pool,
    dselect_k,
    dynmoe,
    expert_attention,
    expert_choice,
    gshard,
    gumbel,
    hash,
    merge,
    modality_pools,
    noisy_topk,
    position,
    prior,
    product_key,
    quantile,
    query_key,
    random,
    random_path,
    recurrent,
    reinforce,
    relu,
    residual,
    segment,
    sinkhorn,
    smoe_dropout,
    soft_moe,
    switch,
    thor,
    top_p,
    topk,
    two_level,
    weight_noise,
)
from moe.routing.option_rules import check_numbers
from moe.routing.router import Router, parameters_of, pick_inputs

ROUTERS: dict[str, Router] = {
    # Token choice: softmax, sigmoid and biased scores.
    "switch": switch.ROUTER,
    "gshard": gshard.ROUTER,
    "noisy_topk": noisy_topk.ROUTER,
    "topk": topk.ROUTER,
    "deepseek_v2": deepseek_v2.ROUTER,
    "deepseek_v3": deepseek_v3.ROUTER,
    "quantile": quantile.ROUTER,
    # Variable numbers of experts a token.
    "top_p": top_p.ROUTER,
    "dynmoe": dynmoe.ROUTER,
    "relu": relu.ROUTER,
    "dselect_k": dselect_k.ROUTER,
    # Other gates.
    "cosine": cosine.ROUTER,
    "query_key": query_key.ROUTER,
    "expert_attention": expert_attention.ROUTER,
    "product_key": product_key.ROUTER,
    "residual": residual.ROUTER,
    "recurrent": recurrent.ROUTER,
    # Assignment, and fixed tables.
    "expert_choice": expert_choice.ROUTER,
    "base": base.ROUTER,
    "sinkhorn": sinkhorn.ROUTER,
    "hash": hash.ROUTER,
    "bigram_hash": bigram_hash.ROUTER,
    "position": position.ROUTER,
    "position_weighted": position.WEIGHTED,
    # Random and learned by reward.
    "random": random.ROUTER,
    "thor": thor.ROUTER,
    "smoe_dropout": smoe_dropout.ROUTER,
    "gumbel": gumbel.ROUTER,
    "gumbel_sampled": gumbel.SAMPLED,
    "reinforce": reinforce.ROUTER,
    "bernoulli": bernoulli.ROUTER,
    "random_path": random_path.ROUTER,
    "random_path_sampled": random_path.SAMPLED,
    "noisy_weights": weight_noise.ROUTER,
    "prior": prior.ROUTER,
    # Soft: mixtures of tokens or of parameters.
    "soft_moe": soft_moe.ROUTER,
    "smear": merge.SMEAR,
    "lory": merge.LORY,
    # Two levels, segments, documents, modalities.
    "two_level": two_level.ROUTER,
    "balanced_groups": balanced_groups.ROUTER,
    "segment": segment.ROUTER,
    "segment_self": segment.SELF_ROUTER,
    "document_pool": document_pool.ROUTER,
    "document_pool_whole": document_pool.WHOLE_ROUTER,
    "modality_pools": modality_pools.ROUTER,
}


def find_router(name: str) -> Router:
    """Returns a row of the table.

    Raises:
        ConfigError: no such router; names the nearest.
    """
    return find_row(ROUTERS, "router.name", name, "not a router")


def router_options(name: str) -> dict[str, Any]:
    """Returns every option of a router with its default, read from its signatures."""
    return find_router(name).options


def check_router(
    name: str,
    num_experts: int,
    *,
    k: int,
    jitter: float = 0.0,
    training: bool = True,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> None:
    """Checks a `router` config section against the number of experts, before anything compiles.

    Args:
        name: a key of `ROUTERS`.
        num_experts: experts that the router chooses among.
        k: experts a token.
        jitter: input noise of the gate.
        training: whether the gate must learn; without, k = 1 needs no gradient.
        sequence_length: positions of a row; None leaves out the checks that need it.
        batch_size: rows of a batch, as above.
        options: the router's own options.

    Raises:
        ConfigError: an unknown name or option, or numbers that cannot work together.
    """
    router = find_router(name)
    known = router.options
    for option in options:
        if option not in known:
            raise ConfigError(
                f"router.{option} is not an option of router.name={name!r}"
                f"{did_you_mean(option, known)}; it takes {', '.join(known) or 'no options'}."
            )
    if not 1 <= k <= num_experts:
        raise ConfigError(
            f"router.k={k} must be between 1 and model.num_experts={num_experts}: a token's "
            "experts are all different. Change router.k or model.num_experts."
        )
    if not 0.0 <= jitter < 1.0:
        raise ConfigError(
            f"router.jitter={jitter} must be at least 0 and below 1: inputs of the gate are "
            "multiplied by 1 - jitter to 1 + jitter. The Switch paper uses 0.01."
        )
    if jitter and not router.learned:
        raise ConfigError(
            f"router.jitter={jitter} with router.name={name!r}: this router has no gate for the "
            "noise to act on. Set router.jitter=0.0."
        )
    check_numbers(options)
    if training or k > 1:
        known_facts = {"sequence_length": sequence_length, "batch_size": batch_size}
        facts = pick_inputs(router.check, known_facts)
        named = {n: v for n, v in options.items() if n in parameters_of(router.check)}
        router.check(num_experts, k=k, **facts, **named)


def check_causal(name: str) -> None:
    """Refuses a router through which a token of a language model would see later ones.

    Raises:
        ConfigError: the router is C3.
    """
    router = find_router(name)
    if router.causality == "C3":
        form = (
            "its evaluation form is causal, and the causal gap between the two is then reported"
            if router.causal_in_eval
            else "it has no causal form: its loss is not that of a model that can generate"
        )
        raise ConfigError(
            f"router.name={name!r} is noncausal (C3): in training, which expert a token gets depends "
            f"on later tokens, so a language model sees its future. Set allow_noncausal=True ({form}), "
            "choose another router, or another task (task.name='classify')."
        )
