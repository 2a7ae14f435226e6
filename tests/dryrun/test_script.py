"""`scripts/dryrun.py` from the command line to exit code, page and file."""

import json
from pathlib import Path
import runpy
import subprocess
import sys

import pytest

from tests.dryrun.example import record, refused

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "dryrun.py")
SMALL = {
    "mesh.data": 1,
    "mesh.fsdp": 2,
    "mesh.expert": 4,
    "model.num_layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.head_dim": 16,
    "model.num_experts": 8,
    "model.expert_width": 16,
    "router.k": 2,
    "data.batch_size": 8,
    "data.sequence_length": 32,
    "dispatch.backend": "blocks",  # whose loops are as long as the data say
}


def test_compiles_prints_writes_and_compares(tmp_path):
    older = tmp_path / "older.json"
    older.write_text(json.dumps({"target": "older", "tokens": 64, "memory": {"gone": 1}}))
    done = subprocess.run(
        [
            *(sys.executable, SCRIPT, "--config=configs/quickstart.py", "--topology=cpu-8"),
            *(f"--config.{key}={value}" for key, value in SMALL.items()),
            *(
                f"--json={tmp_path / 'new.json'}",
                f"--hlo={tmp_path / 'new.hlo'}",
                f"--compare={older}",
            ),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page, made = done.stdout.splitlines(), json.loads((tmp_path / "new.json").read_text())
    assert page[0].startswith(
        "cpu-8: 8 devices, fsdp 2 x expert 4, rules separate; 53,920 parameters"
    )
    assert ["tokens", "64", "256", "4.000"] in [line.split() for line in page]
    assert page[-1].startswith("only in one of them: ")
    assert "memory.gone" in page[-1]
    assert made["config"] == "configs/quickstart.py"
    assert made["overrides"] == {key: str(value) for key, value in SMALL.items()}
    assert made["devices"] == 8
    assert made["memory"]["fits"]
    assert made["collectives"]["sums"]["exchange"] > 0
    assert any(
        "grouped_matmul" in loop for loop in made["unknown_loops"]
    )  # blocks of rows on the CPU
    assert any("whose length depends on data" in sentence for sentence in made["advice"])
    assert (tmp_path / "new.hlo").read_text().startswith("HloModule jit_train_step")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script in this process; nothing here may get as far as compiling."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [SCRIPT, *arguments])
        monkeypatch.setattr("moe.dryrun.build.compile_step", lambda _: pytest.fail("it compiles"))
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(SCRIPT, run_name="__main__")
        return exit_.value.code, *capsys.readouterr()

    return call


CONFIG = "--config=configs/quickstart.py"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((CONFIG,), "--topology=... is missing"),
        (("--topology=v5e-64",), "--config=... is missing"),
        ((CONFIG, "--topology=v9z-64"), "no device is called 'v9z'"),
        ((CONFIG, "--topology=v5e-48"), "no slice of v5e has 48 chips"),
        ((CONFIG, "--topology=64"), "is not KIND:AxB or KIND-COUNT"),
        (
            (CONFIG, "--topology=v5e-4", "--compare=absent.json"),
            "--compare=absent.json is no record",
        ),
        (("--table=absent.json",), "--table=absent.json is no record"),
        ((CONFIG, "--topologie=v5e-4"), "topologie"),
    ],
)
def test_a_mistake_exits_2_with_one_paragraph(run, arguments, said):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("ConfigError: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["no json", "[]", '{"tokens": 3}'])
def test_a_file_that_is_no_record(run, tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    for flag in ("compare", "table"):
        code, _, err = run(CONFIG, "--topology=v5e-4", f"--{flag}={path}")
        assert code == 2
        assert f"--{flag}={path} is no record of a dry run" in err


def test_table(run, tmp_path):
    for name, made in (("a", record()), ("b", refused())):
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    code, out, _ = run(f"--table={tmp_path / 'a.json'},{tmp_path / 'b.json'}")
    assert not code
    assert [line.split(" | ")[4] for line in out.splitlines()[2:]] == [
        "fits: 25.00 GiB of 95.00 GiB",
        "does not fit: more of 95.00 GiB",
    ]
