"""Speed and memory on the CPU as ratios, with a bound for each; benchmarks/README.md says what they mean.

    python3 benchmarks/run.py --only=layer,skew --repeats=11
    python3 benchmarks/run.py --json=benchmarks/baseline.json --write
    python3 benchmarks/run.py --check

`--check` ends with code 1 if a ratio is worse than the stored one beyond noise.
"""

from pathlib import Path
import sys

from absl import flags

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import rows, sections, table
from moe import cli

FLAGS = flags.FLAGS
BASELINE = sections.ROOT / "benchmarks" / "baseline.json"
README = sections.ROOT / "benchmarks" / "README.md"


def define_flags() -> None:
    """Only where this is the program: a section's process imports the file again."""
    flags.DEFINE_list("only", None, f"Sections to measure: {', '.join(sections.SECTIONS)}.")
    flags.DEFINE_integer("repeats", 11, "Timed rounds of every section.", lower_bound=1)
    flags.DEFINE_string("json", None, "File to store rows in; other sections in it stay.")
    flags.DEFINE_string("baseline", str(BASELINE), "Stored rows, of --check and --write.")
    flags.DEFINE_bool("check", False, "Fails on a regression beyond noise.")
    flags.DEFINE_bool("write", False, "Writes the stored rows into benchmarks/README.md.")
    flags.DEFINE_bool("measure", True, "--nomeasure --write only writes.")


def main(argv: list[str]) -> int:
    """Measures what the flags name, and compares or writes."""
    cli.parse_flags(argv)
    names = sections.find(FLAGS.only) if FLAGS.measure else []
    store = Path(FLAGS.json) if FLAGS.json else None
    old = rows.load(Path(FLAGS.baseline)) if FLAGS.check else None
    new = measure(names, FLAGS.repeats, store)
    if FLAGS.write:
        table.write(README, rows.load(store or Path(FLAGS.baseline)))
    return 0 if old is None else report(rows.pairs(new, old))


def measure(names: list[str], repeats: int, store: Path | None) -> dict[str, rows.Section]:
    """Measures and prints section by section; what is done is stored before the next one starts."""
    new = {}
    for name in names:
        measured = tuple(sections.measure(name, repeats))
        new[name] = rows.Section(measured, sections.origin(repeats))
        print(f"\n{name}\n{table.text(measured)}", flush=True)
        if store is not None:
            rows.save(store, {name: new[name]})
    return new


def report(pairs: list[tuple[rows.Row, rows.Row]]) -> int:
    """Prints regressions; the exit code, which is 1 too where there is nothing to compare."""
    if not pairs:
        print("\nno row that was measured is stored: nothing was compared")
        return 1
    found = [text for text in (rows.regression(*pair) for pair in pairs) if text is not None]
    print(f"\n{len(found)} of {len(pairs)} rows are worse than stored, beyond noise")
    for line in found:
        print(f"  {line}")
    return 1 if found else 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
