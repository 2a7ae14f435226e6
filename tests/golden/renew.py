"""Writes the golden files of the configs: `python3 -m tests.golden.renew`, then read the diff."""

from pathlib import Path

from moe.cli import load_config

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs"
PRESETS = ("models.py", "routers.py", "__init__.py")  # imported by configs, no experiments


def config_files() -> list[Path]:
    """Every config of one experiment."""
    return sorted(path for path in CONFIGS.glob("*.py") if path.name not in PRESETS)


def resolved(path: Path) -> str:
    """A config with every key filled in, as text: one `key = value` a line, sorted."""
    lines: list[str] = []

    def add(prefix: str, section: dict) -> None:
        for key, value in sorted(section.items()):
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            else:
                lines.append(f"{prefix}{key} = {value!r}")

    add("", load_config(str(path)).to_dict())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for config in config_files():
        (HERE / f"{config.stem}.txt").write_text(resolved(config))
