from __future__ import annotations

import pytest

import steer_adapter
from steer_adapter import cli
from steer_adapter.errors import DataError


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "train", "generate", "130"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == steer_adapter.__version__


@pytest.mark.parametrize("argv", [[], ["fly"], ["--fly"]])
def test_wrong_usage_is_2(argv, capsys):
    assert cli.main(argv) == 2
    assert "expected one of demo, train, plan" in capsys.readouterr().err


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_each_command_has_help_and_refuses_unknown_options(command, capsys):
    for argv, code in ((["--help"], 0), (["--no-such-option", "1"], 2)):
        with pytest.raises(SystemExit) as exit_:
            cli.main([command, *argv])
        assert exit_.value.code == code
    assert f"usage: steer-adapter {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("no rows"), 1), (OSError("disk"), 1), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def run(argv):
        raise error

    monkeypatch.setattr("steer_adapter.cli.generate.run", run)
    assert cli.main(["generate"]) == code
    assert (str(error) or "interrupted") in capsys.readouterr().err
