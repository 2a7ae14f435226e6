import json

import pytest

from moe.config import default_config
from moe.data.open import make_data
from moe.errors import ConfigError, DataError


def section(tmp_path, files, **changes):
    data = default_config().data
    with data.unlocked(), data.ignore_type():
        data.update({"name": "pairs", "batch_size": 4, "sequence_length": 32})
        data.update({"files": files, "directory": str(tmp_path / "data"), **changes})
    return data


def test_own_pairs_become_rows(tmp_path):
    rows = [{"source": f"number {i}", "target": f"nummer {i}"} for i in range(300)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = make_data(section(tmp_path, str(path)), seed=0, task="seq2seq", prefix=True)
    assert sum(data.num_rows(split) for split in data.splits) == 300
    assert next(data.train_batches()).prefix.any()
    source, target = tmp_path / "a.txt", tmp_path / "b.txt"
    source.write_text("\n".join(row["source"] for row in rows))
    target.write_text("\n".join(row["target"] for row in rows))
    both = make_data(section(tmp_path, f"{source},{target}"), seed=0, task="match")
    assert both.num_rows("test") == data.num_rows("test")


def test_files_that_are_no_pairs(tmp_path):
    with pytest.raises(ConfigError, match=r"needs data\.files"):
        make_data(section(tmp_path, None), seed=0, task="seq2seq")
    few = tmp_path / "few.tsv"
    few.write_text("one\tuno\n")
    with pytest.raises(DataError, match="at least a few hundred"):
        make_data(section(tmp_path, str(few)), seed=0, task="seq2seq")
