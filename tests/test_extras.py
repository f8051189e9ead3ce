from __future__ import annotations

import pytest

import steer_adapter
from steer_adapter import cli
from steer_adapter.errors import MissingExtraError, SteerError
from steer_adapter.extras import require


def test_what_is_installed_passes():
    require("torch", "train", "Anything")


def test_what_is_missing_names_the_command():
    with pytest.raises(
        MissingExtraError, match=r"Flying needs the package 'no_such_wings'.*pip install 'steer-adapter\[fly\]'"
    ):
        require("no_such_wings", "fly", "Flying")
    assert issubclass(MissingExtraError, (SteerError, ImportError))


@pytest.mark.parametrize(("command", "extra"), [("train", "train"), ("demo", "demo")])
def test_commands_without_their_extra(monkeypatch, capsys, command, extra):
    monkeypatch.setattr("steer_adapter.extras.find_spec", lambda name: None)
    assert cli.main([command, "--help"]) == 1
    assert f"pip install 'steer-adapter[{extra}]'" in capsys.readouterr().err


def test_the_trainer_without_its_extra(monkeypatch):
    monkeypatch.setattr("steer_adapter.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"BiPOTrainer needs the package 'trl'.*steer-adapter\[train\]"):
        steer_adapter.BiPOTrainer  # noqa: B018
