from __future__ import annotations

import pytest
from huggingface_hub import constants

from steer_adapter.files.names import hub_id, revision_of, same_model


SNAPSHOT = "/home/me/.cache/huggingface/hub/models--org--a-model.v1/snapshots/0123abcd"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (None, None),
        ("", None),
        ("gpt2", "gpt2"),
        ("org/a-model.v1", "org/a-model.v1"),
        (SNAPSHOT, "org/a-model.v1"),
        ("/home/me/model", None),
        ("./model", None),
        ("a/b/c", None),
        ("a b", None),
    ],
)
def test_hub_id(name, wanted):
    assert hub_id(name) == wanted


def test_a_folder_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/model") == "org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub_id("org/model") is None


def test_revision(tmp_path, monkeypatch):
    assert revision_of(SNAPSHOT) == "0123abcd"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert revision_of("org/model") is None
    for count, commit in enumerate(("aaa", "bbb")):
        folder = tmp_path / "models--org--model" / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert revision_of("org/model") == ("aaa" if count == 0 else None), "of two it can't be told which"


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ("org/model", "org/model", True),
        ("org/model", SNAPSHOT, False),
        ("org/a-model.v1", SNAPSHOT, True),
        ("org/model", "/data/model/", True),
        ("org/model", "org/other", False),
        (None, "org/other", True),
    ],
)
def test_same_model(first, second, wanted):
    assert same_model(first, second) is wanted
