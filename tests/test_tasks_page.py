"""The builders of docs/tasks.md prepare data that training can read."""

import importlib
from pathlib import Path
import re
import wave

from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from moe.cli import load_config
from moe.data.open import make_data
from moe.data.sources.builder import write_quietly

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tasks.md").read_text()
BUILDERS = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
COUNT = 40


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Runs a builder of the page where the data is, and opens what it prepared for a task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(name: str, task: str, /, **changes):
        (tmp_path / f"{name}.py").write_text(BUILDERS[name])
        module = importlib.import_module(name)
        made = getattr(module, name.title().replace("_", ""))
        write_quietly(made(data_dir=tmp_path / "data", file_format="array_record"))
        section = {"name": f"tfds:{name}", "batch_size": 4}
        section |= {"directory": str(tmp_path / "data")} | changes
        return make_data(ConfigDict(section), seed=0, task=task)

    return run


def of_command(name: str) -> dict:
    """The data section of the page's command that trains on `name`."""
    (command,) = (c for c in re.findall(r"train\.py (?:.*\\\n)*.*", PAGE) if name in c)
    (file,) = re.findall(r"--config=(\S+)", command)
    config = load_config(str(ROOT / file), re.findall(r"--config\.(\S+?)=(\S+)", command))
    section = config.data.to_dict()
    return {key: value for key, value in section.items() if key != "directory"}


def test_commands_of_the_page_are_understood():
    commands = re.findall(r"train\.py (?:.*\\\n)*.*", PAGE)
    assert len(commands) >= 6
    for command in commands:
        (file,) = re.findall(r"--config=(\S+)", command)
        load_config(str(ROOT / file), re.findall(r"--config\.(\S+?)=(\S+)", command))


def test_every_config_of_the_results_is_there():
    named = re.findall(r"^\| `(configs/\w+\.py)` \|", PAGE, re.MULTILINE)
    assert len(named) >= 14
    for file in named:
        load_config(str(ROOT / file), [])


def test_builders_are_short():
    assert set(BUILDERS) == {"own_pictures", "own_sounds"}
    for code in BUILDERS.values():
        lines = [line for line in code.splitlines() if line.strip()]
        body = [line for line in lines if not line.startswith(("import", "from"))]
        assert len(body) <= 16


def test_pictures_in_folders(read, tmp_path):
    for i in range(2 * COUNT):
        folder = tmp_path / "pictures" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200 * (i % 2), i, 0)).save(folder / f"{i}.png")
    data = read("own_pictures", "classify", **of_command("tfds:own_pictures"))
    assert data.classes == ("cat", "dog")
    assert sum(data.num_rows(split) for split in ("train", "valid", "test")) == 2 * COUNT
    batch = next(data.eval_batches("train"))
    assert batch.frames.shape == (64, 49, 8 * 8 * 3)
    bright = batch.frames.mean(axis=(1, 2)) > batch.frames.mean()
    np.testing.assert_array_equal(bright, batch.label == 1)


def test_recordings_with_transcripts(read, tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    for i in range(COUNT):
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            noise = np.random.default_rng(i).integers(-9000, 9000, 4000).astype(np.int16)
            file.writeframes(noise.tobytes())
        (folder / f"{i}.txt").write_text(f"a{i % 3}\n")
    data = read("own_sounds", "ctc", sequence_length=32, tokenizer="characters", vocab_size=16)
    batch = next(data.eval_batches("train"))
    assert batch.frames.shape[0] == 4
    assert (batch.scored.sum(axis=1) == 2).all()
    assert (batch.valid.sum(axis=1) >= 10).all()


def test_pairs_of_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"word number {i}\tnumero {i}\n" for i in range(300)]
    (tmp_path / "pairs.tsv").write_text("".join(lines))
    section = of_command("data.name=pairs") | {"directory": str(tmp_path / "data")}
    section |= {"batch_size": 4, "vocab_size": 300}
    data = make_data(ConfigDict(section), seed=0, task="seq2seq")
    sizes = {split: data.num_rows(split) for split in ("train", "valid", "test")}
    assert sum(sizes.values()) == 300
    assert sizes["train"] > 250
    batch = next(data.eval_batches("train"))
    target = batch.targets[0][batch.scored[0]]
    assert re.fullmatch(r"numero \d+", data.tokenizer.decode(target[:-1]))
    assert target[-1] == data.tokenizer.boundary
