"""Stands in for train_seeds.py: leaves a result for each seed, slowly, or fails on request.

The loss is router.k + seed / 10. `data.text_feature` chooses a misbehaviour. It imports nothing heavy.
"""

import json
from pathlib import Path
import sys
import time


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
        loss = int(flags.get("config.router.k", 4)) + seed / 10
        record = {"seed": seed, "settings": {"optimizer": {"learning_rate": rate}}}
        record["metrics"] = {"loss": loss, "tokens_per_second": 1000.0}
        (run / "result.json").write_text(json.dumps(record))


main()
