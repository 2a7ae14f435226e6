"""One preset for every router: the settings of its paper, fitted to the config at hand.

    python3 train.py --config=configs/quickstart.py:router=deepseek_v3 --workdir=runs/deepseek_v3

A preset sets `router` and the weights of all `losses` (0 for what the paper does not use) and nothing else,
with one exception: where a method fixes `router.k`, `model.expert_width` changes so that k x expert_width, the
active compute of a token, stays what it was. Published numbers that hang on the number of experts are
scaled, and a label says how. Where it says "ours" no published number exists, or none that was checked.

Capacity, shared experts and schedules are other sections' and stay as they are. Routers that are noncausal
(C3) train a language model only with `--config.allow_noncausal=true`. The presets are in configs/presets/.
"""

from moe.config import ConfigDict, import_beside, nearest, replace_section
from moe.errors import ConfigError

common, *groups = (
    import_beside(__file__, f"presets/{name}.py")
    for name in ("common", "token_choice", "gates", "random", "structure")
)
Sections, Size = common.Sections, common.Size

PRESETS = {make.__name__: make for group in groups for make in group.PRESETS}


def get(name: str, size: common.Size | None = None) -> common.Sections:
    """The config sections of a preset.

    Args:
        name: a key of `PRESETS`.
        size: what it is fitted to; None stands for the quickstart's.

    Raises:
        ConfigError: no such preset; names the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"router={name!r} is no preset of configs/routers.py: {nearest(name, PRESETS)}; there are "
            f"{', '.join(PRESETS)}."
        )
    return PRESETS[name](size or Size())


def apply(config: ConfigDict, name: str) -> None:
    """Gives a config the router of a preset, at equal active compute.

    Args:
        config: changed in place: `router`, `losses`, and `model.expert_width` if the preset's k differs.
        name: a key of `PRESETS`.

    Raises:
        ConfigError: no such preset, or no whole expert width of equal compute.
    """
    m, k = config.model, config.router.k
    size = Size(m.num_experts, k, config.data.sequence_length, config.steps)
    sections = get(name, size)
    own = sections["router"]["k"]
    if k * m.expert_width % own:
        raise ConfigError(
            f"router={name!r} takes router.k={own} experts, of which none has a whole width of equal "
            f"compute: router.k={k} x model.expert_width={m.expert_width} is not divisible by {own}. "
            "Change model.expert_width."
        )
    m.expert_width = k * m.expert_width // own
    replace_section(config, "router", sections["router"])
    config.losses.update(sections["losses"])
