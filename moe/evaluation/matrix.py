"""A matrix of evaluations: `router.k=1,2,4;dispatch.capacity_factor=1.0,none`."""

import itertools

from moe.errors import ConfigError


def parse(text: str) -> list[list[tuple[str, str]]]:
    """Every combination, each a list of (key, value) overrides; the last key varies fastest.

    Raises:
        ConfigError: a part that is not `key=value,value`, or a key that stands twice.
    """
    axes = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        key, equals, values = part.partition("=")
        options = [v.strip() for v in values.split(",") if v.strip()]
        if not equals or not key.strip() or not options:
            raise ConfigError(
                f"--matrix: {part!r} is not key=value,value. Write for example "
                "--matrix='router.k=1,2;dispatch.capacity_factor=1.0,none'."
            )
        axes.append([(key.strip(), value) for value in options])
    keys = [axis[0][0] for axis in axes]
    if not axes or len(set(keys)) < len(keys):
        raise ConfigError(f"--matrix={text!r} needs at least one key, and each key once.")
    return [list(pairs) for pairs in itertools.product(*axes)]
