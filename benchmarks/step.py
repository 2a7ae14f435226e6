"""The quickstart's whole training step: beside its dense twin, and what it spends its time on."""

from benchmarks import op_times
from benchmarks.model_run import Training, random_run
from benchmarks.op_times import Shares
from benchmarks.rows import Row, times
from benchmarks.timing import interleave
from moe import cli

CONFIG, BOUND, OUTSIDE = "configs/quickstart.py", 1.2, 0.2
INSIDE = ("attention", "experts")


def measure(repeats: int, overrides: tuple[tuple[str, str], ...] = ()) -> list[Row]:
    """The sparse step over the dense one, and the share outside attention and experts.

    Args:
        repeats: rounds.
        overrides: pairs of a config key and a value in text, for smaller sizes.
    """
    runs = {}
    for side, path in (("sparse", CONFIG), ("dense", f"{CONFIG}:dense")):
        runs[side] = Training(random_run(cli.load_config(path, overrides)))
    took = interleave(runs, repeats)
    found = [times("quickstart step / its dense twin's", took["sparse"], took["dense"], BOUND)]
    # Tracing every operation slows the small ones: a step of its own, not one of the timed ones.
    told = [op_times.profile(runs["sparse"], runs["sparse"].text) for _ in range(repeats)]
    return [*found, outside_row(told)]


def outside_row(told: list[Shares]) -> Row:
    """The share of everything but INSIDE, round by round; the parts of the last round as its note."""
    above = tuple(1.0 - sum(shares.parts.get(part, 0.0) for part in INSIDE) for shares in told)
    name = "quickstart step outside attention and experts"
    return Row(
        name, above, (1.0,) * len(above), OUTSIDE, kind="share", note=parts_note(told[-1].parts)
    )


def parts_note(parts: dict[str, float]) -> str:
    """As `experts 60%, attention 25%, ...`, largest first."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {share:.1%}" for part, share in ordered)
