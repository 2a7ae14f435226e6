from pathlib import Path
import runpy

import pytest

from tests.report.fake_run import write_run

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "report.py")


@pytest.fixture
def run(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", [SCRIPT, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(SCRIPT, run_name="__main__")
        return exit_.value.code

    return call


def test_writes_the_page_and_prints_its_path(run, tmp_path, capsys):
    assert not run(write_run(tmp_path / "run", steps=20))
    path = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    assert path.stat().st_size > 1e6


def test_a_workdir_without_a_run_exits_3_and_leaves_nothing(run, tmp_path, capsys):
    assert run(tmp_path / "absent") == 3
    assert "DataError" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("--help",)])
def test_other_usage_exits_2(run, arguments, capsys):
    assert run(*arguments) == 2
    assert "usage" in capsys.readouterr().err
