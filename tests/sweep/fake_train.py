"""Stands in for train.py: writes metrics.jsonl quickly, resumes, saves on SIGTERM, fails on request.

The metric falls towards `router.k` / 10 + `losses.balance` + seed / 1000. `data.text_feature` chooses
a misbehaviour.
"""

import json
import os
from pathlib import Path
import signal
import sys
import time

EVERY = 10


def read_flags():
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    workdir = Path(flags.pop("workdir"))
    return workdir, {k.removeprefix("config."): v for k, v in flags.items()}


def misbehave(mode, workdir):
    """Ends the run at half its steps, by mode."""
    if mode == "fail":
        sys.stderr.write("ConfigError: router.k=9 is above model.num_experts=8: lower it.\n")
        sys.exit(2)
    if mode == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "preempted" and not (workdir / "was-preempted").exists():
        (workdir / "was-preempted").touch()
        sys.exit(75)
    if mode == "stuck":
        sys.exit(75)
    if mode == "tells":
        files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        sys.stdout.write(f"{sys.argv} {dict(os.environ)} {files}\n")
        sys.exit(6)
    if mode.startswith("exit"):
        end(mode, workdir)


def end(mode, workdir):
    """By an exit code, or by a signal where it is below 0; a mode `..._once` does so once."""
    mark = workdir / "ended-once"
    code = int(mode.removeprefix("exit").removesuffix("_once"))
    if mode.endswith("_once") and mark.exists():
        return
    mark.touch()
    sys.stderr.write("Trouble: no room for postgresql://me:hush@db/x?password=hush2: free some.\n")
    sys.stderr.flush()
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def main():
    workdir, config = read_flags()
    workdir.mkdir(exist_ok=True)
    path = workdir / "metrics.jsonl"
    mode = config.get("data.text_feature", "text")
    seconds = float(config.get("optimizer.learning_rate", 0.0))  # for each evaluation
    steps = int(config.get("steps", 40))
    target = float(config.get("router.k", 2)) / 10 + float(config.get("losses.balance", 0.0))
    target += int(config["seed"]) / 1000
    done = (
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )
    log = workdir.parent.parent.parent / "log.jsonl"  # one line an evaluation, whole by O_APPEND

    def tell(event, **values):
        with log.open("a") as file:
            file.write(json.dumps({"event": event, "run": str(workdir), **values}) + "\n")

    if max(done, default=0) >= steps:
        tell("done already")
        return
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    tell("start", resumed=bool(done), argv=sys.argv[1:])
    for step in range(max(done, default=0) + EVERY, steps + 1, EVERY):
        time.sleep(seconds)
        if step > steps // 2:
            misbehave(mode, workdir)
        value = None if mode == "nan" else target + 1.0 / step
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "split": "train", "loss/total": 1.0}) + "\n")
            file.write(json.dumps({"step": step, "split": "valid", "bits_per_byte": value}) + "\n")
        tell("step", step=step)
        if stopping and step < steps:
            sys.exit(75)
    tell("finish")


main()
