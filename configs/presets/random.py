"""Random routing, and routing learned by reward."""

from typing import Any

from moe.config import import_beside

common = import_beside(__file__, "common.py")


def random(size: common.Size) -> common.Sections:
    """Uniform choice for each token, the control. Zuo et al. 2022, arXiv:2110.04260, without its loss."""
    return common.preset("random", {"k": size.k})


def thor(size: common.Size) -> common.Sections:
    """THOR. Zuo et al. 2022, arXiv:2110.04260.

    One random expert for the whole batch. Released: alpha = 5 between two passes, which cost twice the
    compute. Here the two cross-entropies are averaged, not added, and the weight is alpha / 2.
    """
    return common.preset("thor", {"k": 1, "scope": "batch", "eval_mode": "token"}, consistency=2.5)


def smoe_dropout(size: common.Size) -> common.Sections:
    """SMoE-Dropout. Chen et al. 2023, arXiv:2303.01610.

    A frozen random gate. Published: from E/2 to E experts over the run. Here from k/2 to k, over the
    steps of the config, so that no step costs more than k experts.
    """
    router = {"k": size.k, "k_min": max(1, size.k // 2), "ramp_steps": size.steps}
    return common.preset("smoe_dropout", router)


def gumbel(size: common.Size) -> common.Sections:
    """Sampling without replacement. Kool et al. 2019, arXiv:1903.06059.

    Unbiased importance weights. Balance 1e-2 and annealing over the steps of the config are ours.
    """
    return common.preset("gumbel", _gumbel(size), balance=1e-2)


def gumbel_sampled(size: common.Size) -> common.Sections:
    """As `gumbel`, sampling in evaluation too."""
    return common.preset("gumbel_sampled", _gumbel(size), balance=1e-2)


def _gumbel(size: common.Size) -> dict[str, Any]:
    gates = "raw" if size.k == size.num_experts else "importance"
    return {"k": size.k, "gates": gates, "tau": 1.0, "tau_end": 0.3, "anneal_steps": size.steps}


def reinforce(size: common.Size) -> common.Sections:
    """REINFORCE with a moving baseline. Bengio et al. 2015, arXiv:1511.06297; Rosenbaum et al. 2018.

    One expert, drawn. Weights 0.01 of the policy and 5e-4 of its entropy are the released ones of
    Muqeeth et al. 2023, arXiv:2306.03745.
    """
    router = {"k": 1, "gates": "one", "baseline": "ema"}
    return common.preset("reinforce", router, policy=0.01, policy_entropy=5e-4)


def bernoulli(size: common.Size) -> common.Sections:
    """Conditional computation. Bengio et al. 2015, arXiv:1511.06297.

    Every expert on or off. Weights as `reinforce`; a price of 0.01 nats an expert is ours. The policy
    decides how many experts it uses.
    """
    router = {"k": size.k, "gates": "one", "baseline": "ema"}
    return common.preset("bernoulli", router, policy=0.01, policy_penalty=0.01, policy_entropy=5e-4)


def random_path(size: common.Size) -> common.Sections:
    """Random paths, ours; kin to PathNet, arXiv:1701.08734, and routing networks, arXiv:1711.01239.

    As many paths as the config has experts a token; evaluation takes the most probable ones.
    """
    return common.preset("random_path", {"k": size.k, "paths": size.k}, balance=1e-2)


def random_path_sampled(size: common.Size) -> common.Sections:
    """As `random_path`, drawing paths in evaluation too."""
    return common.preset("random_path_sampled", {"k": size.k, "paths": size.k}, balance=1e-2)


def noisy_weights(size: common.Size) -> common.Sections:
    """NoisyNets. Fortunato et al. 2018, arXiv:1706.10295, on the gate's kernel.

    Published: factorised noise, learned sigma from 0.5 / sqrt(D), scale 1. Balance 1e-2 is ours.
    """
    router = {"k": size.k, "noise_mode": "factorised", "noise_scale": 1.0}
    return common.preset("noisy_weights", router, balance=1e-2)


def prior(size: common.Size) -> common.Sections:
    """A prior over modules, ours; Hedge is Freund and Schapire 1997, EXP3 Auer et al. 2002."""
    return common.preset("prior", {"k": size.k, "prior_weight": 1.0}, balance=1e-2)


PRESETS = (
    *(random, thor, smoe_dropout, gumbel, gumbel_sampled, reinforce, bernoulli),
    *(random_path, random_path_sampled, noisy_weights, prior),
)
