"""How many experts a token takes, and how hard the balance loss pulls, on the quickstart.

    python3 scripts/sweep.py --config=configs/sweeps/routing.py --workdir=runs/routing --workers=2

A grid of 2 x 4 points, 3 seeds each: 24 runs of the quickstart, which is hours on two cores; add
`--config.steps=50` for a first look. The question is how much balance loss keeps all experts in use
before it costs bits per byte: Switch chose 0.01 by that trade (arXiv:2101.03961, section 2.2).

`space` takes `{"values": [...]}`, `{"low", "high", "log": True}` or `{"low", "high", "step"}`; `sampler` is
`grid`, `random` or `tpe` (the last two need `trials`); `pruner` is `none`, `median` or `hyperband` and
looks at the first seed of a point.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A base config, what changes, and how the search goes."""
    config = ConfigDict(convert_dict=False)  # the keys of `space` have dots
    config.base = "configs/quickstart.py"
    config.overrides = {"checkpoint.keep_best": 0}
    config.space = {
        "router.k": {"values": [2, 4]},
        "losses.balance": {"values": [0.0, 0.001, 0.01, 0.1]},
    }
    config.sampler = "grid"
    config.pruner = "none"
    config.seeds = (0, 1, 2)
    config.metric = "bits_per_byte"
    config.split = "valid"
    config.direction = "minimize"
    return config
