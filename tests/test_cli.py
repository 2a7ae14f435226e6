"""From the command line to a config, and from an exception to an exit code."""

from unittest import mock

from absl import flags
import pytest

from moe import cli
from moe.cli import complete_config
from moe.config import ConfigDict, default_config
from moe.errors import CheckpointError, ConfigError, DataError


def test_split_overrides():
    argv = ["train.py", "--config=a.py:dense", "-config.steps=5", "--workdir=w", "--config.a.b=c=d"]
    rest, path, overrides = cli.split_overrides(argv)
    assert rest == ["train.py", "--workdir=w"]
    assert path == "a.py:dense"
    assert overrides == [("steps", "5"), ("a.b", "c=d")]
    with pytest.raises(ConfigError, match=r"--config\.steps=VALUE"):
        cli.split_overrides(["train.py", "--config.steps", "5"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("x = 1", r"no function get_config\(\)"),
        ("def get_config():\n    return {}", "returned no ConfigDict"),
    ],
)
def test_config_file_that_is_none(tmp_path, text, message):
    path = tmp_path / "config.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        cli.load_config(str(path))


def test_config_file_with_an_argument_and_overrides():
    config = cli.load_config("configs/quickstart.py:dense", [("steps", "3")])
    assert config.model.pattern == ("dense",)
    assert config.steps == 3
    assert cli.load_config("configs/quickstart.py:router=hash").router.kind == "random"
    with pytest.raises(ConfigError, match=r"'sparse' .* neither 'dense' nor 'router=NAME'"):
        cli.load_config("configs/quickstart.py:sparse")


def make_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_integer("length", 3, "How long.", flag_values=values)
    return values


def test_parse_flags():
    values = make_flags()
    cli.parse_flags(["x.py", "--length=5"], values)
    assert values.length == 5
    for argv, message in (
        (["--lenght=5"], "lenght"),
        (["--length=far"], "far"),
        (["length"], "unexpected argument 'length'"),
    ):
        with pytest.raises(ConfigError, match=message):
            cli.parse_flags(["x.py", *argv], make_flags())
    with pytest.raises(ConfigError, match=r"--workdir=\.\.\. is missing"):
        cli.require_flags(config="a", workdir=None)


def test_help_lists_the_flags_and_ends_well(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse_flags(["x.py", "--help"], make_flags())
    assert end.value.code == 0
    assert "How long." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError, 2), (DataError, 3), (CheckpointError, 4)]
)
def test_user_errors_become_one_paragraph_and_a_code(error, code, capsys):
    def main(argv):
        raise error("what, why and how to mend it.")

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == code
    captured = capsys.readouterr()
    assert captured.err == f"{error.__name__}: what, why and how to mend it.\n"
    assert captured.out == ""


def test_other_errors_keep_their_traceback():
    def main(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(main)


def test_main_decides_the_exit_code():
    with pytest.raises(SystemExit) as end:
        cli.run(lambda argv: 75)
    assert end.value.code == 75


@pytest.mark.parametrize(
    ("raised", "code"),
    [(None, 0), (ConfigError(""), 2), (RuntimeError(), 1), (SystemExit(75), 75), (SystemExit(), 0)],
)
def test_every_way_out_is_bounded_in_time_with_its_own_code(raised, code):
    def main(argv):
        if raised is not None:
            raise raised

    with mock.patch("moe.cli.leave_in_time") as leave, pytest.raises((SystemExit, RuntimeError)):
        cli.run(main)
    leave.assert_called_once_with(code)


def test_a_config_without_checks_is_read_back():
    config = complete_config(default_config(), [("evaluation.generalisation", "none")])
    again = complete_config(ConfigDict(config.to_dict()))
    assert again.evaluation.generalisation is None
