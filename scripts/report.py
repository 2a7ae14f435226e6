"""Writes DIR/report.html from what a run has logged so far: `python3 scripts/report.py DIR`."""

from moe import cli
from moe.errors import ConfigError
from moe.report import write_report


def main(argv: list[str]) -> None:
    """The one argument is the workdir of a run."""
    if len(argv) != 2 or argv[1].startswith("-"):
        raise ConfigError(
            "usage: python3 scripts/report.py DIR, where DIR is the workdir of a run."
        )
    print(write_report(argv[1]))


if __name__ == "__main__":
    cli.run(main)
