"""What is sent and what is not; the sending itself is in tests/hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import make_model
from huggingface_hub.errors import EntryNotFoundError
from peft import get_peft_model

from steer_adapter import SteerConfig
from steer_adapter.errors import ConfigError, OutputError, VectorError
from steer_adapter.sharing.push import push_adapters


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "adapter"
    get_peft_model(make_model(), SteerConfig(layers_to_transform=1)).save_pretrained(folder)
    return folder


@pytest.fixture
def sent(monkeypatch):
    """Stands for the Hub: an empty repository, and what was uploaded to it."""
    files: dict[str, str] = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, folder_path, **kwargs):
            paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
            files.update({str(p.relative_to(folder_path)): p.read_bytes().decode("latin-1") for p in paths})

    def nothing(*args, **kwargs):
        raise EntryNotFoundError("no")

    monkeypatch.setattr("steer_adapter.sharing.push.HfApi", Api)
    monkeypatch.setattr("steer_adapter.sharing.push.hf_hub_download", nothing)
    return files


def test_nothing_but_the_adapter_is_sent(folder, sent):
    (folder / "secret.txt").write_text("secret")
    (folder / "training_args.bin").write_bytes(b"pickle")
    before = (folder / "README.md").read_bytes()
    push_adapters(folder, "user/vector")
    assert set(sent) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "'user/vector'" in sent["README.md"] and str(folder) not in sent["README.md"]
    assert (folder / "README.md").read_bytes() == before, "the folder is left as it is"


def test_a_run_file_without_local_paths(folder, sent):
    options = {"model": "org/model", "data": "/home/me/pairs.jsonl", "output": "/home/me/out", "seed": 3, "beta": 0.1}
    (folder / "run.yaml").write_text("# How\n" + yaml.safe_dump(options))
    push_adapters(folder, "user/vector")
    assert sent["run.yaml"].startswith("# How\n") and "/home/me" not in sent["run.yaml"]
    assert yaml.safe_load(sent["run.yaml"]) == {"model": "org/model", "data": "pairs.jsonl", "seed": 3, "beta": 0.1}


def test_symbolic_links_are_refused(folder, sent, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "run.yaml").symlink_to(tmp_path / "secret")
    with pytest.raises(OutputError, match="run.yaml: received a symbolic link"):
        push_adapters(folder, "user/vector")
    (folder / "run.yaml").unlink()
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "calm").symlink_to(folder)
    with pytest.raises(OutputError, match="received a symbolic link"):
        push_adapters(tmp_path / "library", "user/vector")
    assert not sent


def test_only_whole_vectors_are_sent(folder, sent):
    (folder.parent / "empty").mkdir()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VectorError, match="cut short"):
        push_adapters(folder, "user/vector")
    with pytest.raises(ConfigError, match="without adapter_config.json"):
        push_adapters(folder.parent / "empty", "user/vector")
    assert not sent


@pytest.mark.parametrize(
    ("base", "pushed"),
    [
        ("/home/me/secret/base", "./base"),
        ("/home/me/hub/models--org--model/snapshots/0123abcd", "org/model"),
        ("org/model", "org/model"),
        ("./base", "./base"),
        (None, None),
    ],
)
def test_a_base_model_without_its_directories(folder, sent, base, pushed, caplog):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    push_adapters(folder, "user/vector")
    config = json.loads(sent["adapter_config.json"])
    assert config["base_model_name_or_path"] == pushed and "/home/me" not in str(sent)
    assert {**config, "base_model_name_or_path": base} == json.loads(path.read_text())
    assert ("nobody else has" in caplog.text) is (base is not None and base.startswith("/home/me/secret"))
    assert ("base_model: org/model" in sent["README.md"]) is (pushed == "org/model")


@pytest.mark.parametrize("part", ["", "calm"])
def test_a_card_that_can_not_be_read_is_refused(folder, sent, part):
    get_peft_model(make_model(), SteerConfig(layers_to_transform=1), adapter_name="calm").save_pretrained(folder)
    (folder / part / "README.md").write_text("---\n{[\n---\n")
    with pytest.raises(OutputError, match=f"{folder / part / 'README.md'} can't be read as a model card"):
        push_adapters(folder, "user/vector")
    assert not sent


@pytest.mark.parametrize(("status", "advice"), [(401, "Log in"), (403, "Log in"), (503, "Push again")])
def test_what_to_do_when_the_hub_refuses(folder, sent, monkeypatch, status, advice):
    def refuse(*args, **kwargs):
        error = OSError("no")
        error.response = SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setattr("steer_adapter.sharing.push.hf_hub_download", refuse)
    with pytest.raises(OutputError, match=f"whole or not at all. {advice}"):
        push_adapters(folder, "user/vector")
