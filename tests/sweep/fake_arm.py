"""Stands in for train_seeds.py: leaves a result for each seed, slowly, or fails on request.

The loss is router.k + seed / 10. `data.text_feature` chooses a misbehaviour. It imports nothing heavy.
"""

import json
import os
from pathlib import Path
import sys
import time


def end(mode, workdir):
    """By an exit code, or by a signal where it is below 0; a mode `..._once` does so once."""
    if not mode.startswith("exit"):
        return
    mark = workdir / "ended-once"
    code = mode.removeprefix("exit").removesuffix("_once")
    if mode.endswith("_once") and mark.exists():
        return
    mark.touch()
    sys.stderr.write("ResourceError: no room for postgresql://me:hush@db/x: free some.\n")
    sys.stderr.flush()
    if int(code) < 0:
        os.kill(os.getpid(), -int(code))
    sys.exit(int(code))


def main():
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    workdir = Path(flags["workdir"])
    mode = flags.get("config.data.text_feature", "text")
    rate = float(flags.get("config.optimizer.learning_rate", 0.003))
    with (workdir.parent / "log.jsonl").open("a") as file:
        file.write(json.dumps({"arm": workdir.name, "seeds": flags["seeds"]}) + "\n")
    for seed in map(int, flags["seeds"].split(",")):
        if mode == "fail_late" and seed > 0:
            sys.stderr.write("ConfigError: this arm cannot work: choose another.\n")
            sys.exit(2)
        if mode == "slow" and seed > 0:
            time.sleep(60)
        run = workdir / f"seed-{seed}"
        run.mkdir(exist_ok=True)
        if seed > 0:
            end(mode, workdir)
        loss = int(flags.get("config.router.k", 4)) + seed / 10
        record = {"seed": seed, "settings": {"optimizer": {"learning_rate": rate}}}
        record["metrics"] = {"loss": loss, "tokens_per_second": 1000.0}
        (run / "result.json").write_text(json.dumps(record))


main()
