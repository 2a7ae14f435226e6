import json
from pathlib import Path
import sys

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(Path(__file__).with_name("fake_train.py"))]
BASE = str(ROOT / "configs" / "quickstart.py")
FILE = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict(convert_dict=False)
    for key, value in {values!r}.items():
        config[key] = value
    return config
"""


def write_sweep(path: Path, **values) -> str:
    """A sweep file over quickstart's keys."""
    given = {
        "base": BASE,
        "overrides": {"steps": 40, "optimizer.learning_rate": 0.0},
        "space": {"router.k": {"values": [2, 4]}},
        "seeds": [0],
    }
    path.write_text(FILE.format(values=given | values))
    return str(path)


def events(workdir: Path, kind: str) -> list[dict]:
    """What the fake trainer noted, in order."""
    lines = (workdir / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]
