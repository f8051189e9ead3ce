from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import make_model
from peft import get_peft_model

from steer_adapter import SteerConfig, cli


def test_the_options_arrive(tmp_path, monkeypatch, capsys):
    seen = {}

    def push(folder, repo_id, **kwargs):
        seen.update(kwargs, folder=folder, repo_id=repo_id)
        return SimpleNamespace(repo_url="https://hub/user/vector", oid="abc")

    monkeypatch.setattr("steer_adapter.cli.push.push_adapters", push)
    options = ["--private", "--revision", "dev", "--token", "t", "--message", "m", "--overwrite-card"]
    assert cli.main(["push", "DIR", "user/vector", *options]) == 0
    assert seen == dict(
        folder="DIR", repo_id="user/vector", private=True, revision="dev", token="t", overwrite_card=True,
        commit_message="m",
    )  # fmt: skip
    assert capsys.readouterr().out == "The adapter is at https://hub/user/vector, commit abc.\n"


def test_no_connection_is_a_clear_error(tmp_path, capsys):
    get_peft_model(make_model(), SteerConfig(layers_to_transform=1)).save_pretrained(tmp_path)
    assert cli.main(["push", str(tmp_path), "user/vector"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: Pushing {tmp_path} to 'user/vector' failed") and "Push again" in error


@pytest.mark.parametrize("arguments", [[], ["DIR"], ["DIR", "REPO", "MORE"]])
def test_wrong_usage_is_2(arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["push", *arguments])
    assert exit_.value.code == 2
