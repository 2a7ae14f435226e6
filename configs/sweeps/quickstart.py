"""The quickstart against its controls: random and hash routing, and the dense twin of equal active FLOPs.

    python3 scripts/sweep.py --config=configs/sweeps/quickstart.py --workdir=runs/controls --workers=2
    python3 scripts/sweep.py --config=configs/sweeps/quickstart.py:dense --workdir=runs/dense --workers=2

Three seeds each; about 25 and 8 minutes on two cores. What it found is in README.md.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Routers with everything else equal, or with `dense` the twin without a router."""
    config = ConfigDict(convert_dict=False)  # the keys of `space` have dots
    config.base = "configs/quickstart.py" + (":dense" if arg == "dense" else "")
    config.overrides = {"checkpoint.keep_best": 0, "evaluation.every": 200}
    names = ["topk"] if arg == "dense" else ["topk", "random", "hash"]
    config.space = {"router.name": {"values": names}}
    config.sampler = "grid"
    config.pruner = "none"
    config.seeds = (0, 1, 2)
    config.metric = "bits_per_byte"
    config.split = "valid"
    config.direction = "minimize"
    return config
