"""Compiles the training step for accelerators that are not here, and says what it costs.

    python3 scripts/dryrun.py --config=configs/scaling.py:olmoe_1b_7b --topology=v5e-64 --json=olmoe.json
    python3 scripts/dryrun.py --config=configs/quickstart.py --topology=cpu-8 --config.mesh.expert=4

The compiler is the target's own: extra `.[tpu]` for TPUs, `.[gpu]` for GPUs; nothing runs. Any
`--config.key=value` changes the config. `--compare=other.json` adds the difference to an earlier run.
`--table=a.json,b.json` compiles nothing and prints earlier runs as a Markdown table.
Exit codes: 0 it fits, 1 it does not, 2 config.
"""

import json
from pathlib import Path
import re
from typing import Any

from absl import flags
import jax

from moe import cli
from moe.dryrun import build, record, show, table, targets
from moe.errors import ConfigError

FLAGS = flags.FlagValues()  # of this program: another one may import it
flags.DEFINE_string(
    "topology", None, "Devices, such as v5p:4x4x4, v5e-64, h100-8, cpu-8.", flag_values=FLAGS
)
flags.DEFINE_string("json", None, "Writes the record to this file.", flag_values=FLAGS)
flags.DEFINE_string("compare", None, "Record of an earlier dry run.", flag_values=FLAGS)
flags.DEFINE_list(
    "table", None, "Records of earlier dry runs, for a Markdown table.", flag_values=FLAGS
)
flags.DEFINE_string("hlo", None, "Writes the compiled module to this file.", flag_values=FLAGS)


def main(argv: list[str]) -> int:
    """Reads the command line, compiles, prints, writes."""
    rest, path, overrides = cli.split_overrides(argv)
    cli.parse_flags(rest, FLAGS)
    if FLAGS.table is not None:
        print(table.table([_read("table", each) for each in FLAGS.table]))
        return 0
    cli.require_flags(config=path, topology=FLAGS.topology)
    old = None if FLAGS.compare is None else _read("compare", FLAGS.compare)
    _only_cpu(FLAGS.topology)
    config = cli.load_config(str(path), overrides)
    target = targets.find_target(FLAGS.topology)
    compiled = build.compile_step(build.plan(config, target))
    found: dict[str, Any] = record.make_record(target, compiled)
    found["config"], found["overrides"] = str(path), dict(overrides)
    print(show.show(found))
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps(found, indent=1) + "\n")
    if FLAGS.hlo and compiled.text is not None:
        Path(FLAGS.hlo).write_text(compiled.text)
    if old is not None:
        print(show.differences(old, found))
    return 0 if found["memory"]["fits"] else 1


def _only_cpu(topology: str) -> None:
    """This process computes on the CPU, with as many devices as a CPU target asks for."""
    jax.config.update("jax_platforms", "cpu")
    count = re.fullmatch(r"cpu-([1-9]\d*)", topology.strip().lower())
    if count:
        jax.config.update("jax_num_cpu_devices", int(count.group(1)))


def _read(flag: str, path: str) -> dict:
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{flag}={path} is no record of a dry run: {error}.") from error
    if not isinstance(found, dict) or "target" not in found:
        raise ConfigError(f"--{flag}={path} is no record of a dry run: it has no entry 'target'.")
    return found


if __name__ == "__main__":
    cli.run(main)
