"""What simple methods reach on the prepared data sets: floors that a trained model must beat.

    python3 benchmarks/floors.py                                   # every set that is prepared
    python3 benchmarks/floors.py --only=imdb,verses_en_es --data_dir=DIRECTORY
    python3 benchmarks/floors.py --write                           # also writes benchmarks/floors.md

Prints examples and 95% bootstrap intervals over them. Needs no accelerator and trains no network.
"""

from pathlib import Path
import subprocess
import sys
import time

from absl import flags

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.floors_methods import result, tasks
from benchmarks.floors_methods.reading import open_data
from moe import cli
from moe.data.open import data_directory
from moe.data.sources.catalogue import CATALOGUE
from moe.errors import ConfigError, DataError, find_row

FLAGS = flags.FlagValues()
ROOT = Path(__file__).parent.parent
STDLIB = "stdlib"  # code and prose, prepared as soon as it is asked for
PAGE = ROOT / "benchmarks" / "floors.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

flags.DEFINE_list("only", None, "Data sets; otherwise all that are prepared.", flag_values=FLAGS)
flags.DEFINE_string(
    "data_dir",
    None,
    "The data directory, as data.directory; TFDS_DATA_DIR or ~/tensorflow_datasets by default.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "write", False, "Writes the rows into benchmarks/floors.md; others stay.", flag_values=FLAGS
)


def measured() -> dict[str, tasks.Task]:
    """What is run on each data set; texts without a task of their own are language."""
    own = {name: task for name, task in tasks.TASKS.items() if name in CATALOGUE}
    texts = [name for name, entry in CATALOGUE.items() if entry.kind == "language"]
    return {**own, **{name: tasks.language for name in (*texts, STDLIB) if name not in own}}


def main(argv: list[str]) -> int:
    """Measures and prints set by set."""
    cli.parse_flags(argv, FLAGS)
    directory = data_directory(FLAGS.data_dir)
    chosen = measured()
    if FLAGS.only:
        chosen = {
            name: find_row(chosen, "--only", name, "no data set with floors") for name in FLAGS.only
        }
    for name, task in chosen.items():
        floors = measure(name, task, directory, required=bool(FLAGS.only))
        if floors and FLAGS.write:
            write(PAGE, floors)
    return 0


def measure(name: str, task: tasks.Task, directory: Path, *, required: bool) -> list[result.Floor]:
    """Runs one data set and prints it.

    Raises:
        DataError: it is not prepared, and `required`; otherwise it is told and left out.
    """
    started = time.perf_counter()
    try:
        data = open_data(name, directory)
    except DataError as error:
        if required:
            raise
        print(f"\n{name}: left out. {error}", flush=True)
        return []
    floors = task(data)
    print(f"\n{name}, {time.perf_counter() - started:.0f} s\n{result.text(floors)}", flush=True)
    return floors


def write(page: Path, floors: list[result.Floor]) -> None:
    """Puts rows between the markers of a page, in place of those of the same data sets.

    Raises:
        ConfigError: the page has no markers.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{page} has no lines {BEGIN!r} and {END!r}: put them back.")
    head, line, *rows = result.markdown(floors, commit()).splitlines()
    names = {_name(row) for row in rows}
    kept = [row for row in old.splitlines()[3:] if _name(row) not in names]
    order = {name: i for i, name in enumerate(measured())}
    table = sorted([*kept, *rows], key=lambda row: order.get(_name(row), len(order)))
    page.write_text("\n".join([f"{before}{BEGIN}", head, line, *table, f"{END}{after}"]))


def _name(row: str) -> str:
    """The data set of a row of the page."""
    return row.strip("| ").split(" | ")[0].partition(":")[0]


def commit() -> str:
    """The commit that is measured."""
    ask = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    cli.run(main)
