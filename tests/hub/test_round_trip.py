"""Vectors go to a Hub over HTTP and come back by every route, with the same logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import hand_logits, make_model, make_tokenizer, random_vectors, set_vectors
from hub.client import Client, ClientError
from hub.server import TOKEN, Hub
from huggingface_hub import ModelCard
from peft import get_peft_model

from steer_adapter import SteerConfig


pytestmark = pytest.mark.slow
LAYERS = [1, 3]
INPUT = [[5, 17, 33, 64, 8]]
PRELUDE = f"""
import torch, steer_adapter
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from steer_adapter.sharing.loading import load_adapters
from steer_adapter.sharing.push import push_adapters
ids = torch.tensor({INPUT})
base = lambda: AutoModelForCausalLM.from_pretrained("user/base").eval()
def logits(model):
    with torch.no_grad():
        return model(ids).logits.flatten().tolist()
def native(name, **kwargs):
    model = base()
    model.load_adapter(name, "loaded", adapter_kwargs=kwargs)
    return model
"""
ROUTES = {
    "PeftModel": "PeftModel.from_pretrained(base(), {})",
    "AutoPeftModel": "AutoPeftModelForCausalLM.from_pretrained({})",
    "AutoModel": "AutoModelForCausalLM.from_pretrained({})",
    "load_adapter": "native({})",
    "pipeline": "pipeline('text-generation', model={}).model",
}


def save_vector(folder: Path, seed: int = 1, adapter: str = "default", layers: list[int] = LAYERS) -> None:
    model = make_model()
    model.name_or_path = "user/base"
    model = get_peft_model(model, SteerConfig(layers_to_transform=layers, task_type="CAUSAL_LM"), adapter_name=adapter)
    set_vectors(model, random_vectors(layers, seed=seed), adapter)
    model.save_pretrained(folder)


def expected(seed: int = 1, layers: list[int] = LAYERS) -> torch.Tensor:
    return hand_logits(make_model(), torch.tensor(INPUT), random_vectors(layers, seed=seed)).flatten()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    hub = Hub()
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    repo = hub.repos["user/base"] = type(hub).new_repo()
    repo.commit("main", {path.name: path.read_bytes() for path in folder.iterdir()})
    yield hub
    hub.close()


@pytest.fixture(autouse=True)
def no_faults(hub: Hub) -> Iterator[None]:
    yield
    hub.fault = lambda method, path: None


def client_for(hub: Hub, factory: pytest.TempPathFactory, **kwargs: object) -> Iterator[Client]:
    client = Client(hub.url, factory.mktemp("home"), **kwargs)
    client.run(PRELUDE)
    yield client
    client.close()


@pytest.fixture(scope="module")
def owner(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    yield from client_for(hub, tmp_path_factory, token=TOKEN)


@pytest.fixture(scope="module")
def stranger(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    yield from client_for(hub, tmp_path_factory)


def push(client: Client, folder: Path, repo: str, **kwargs: object) -> str:
    return client.run(f"result = push_adapters({str(folder)!r}, {repo!r}, **{kwargs!r}).oid")


def check(client: Client, expression: str, **kwargs: object) -> None:
    received = torch.tensor(client.run(f"result = logits({expression})"))
    assert (received - expected(**kwargs)).abs().max() <= 1e-5, expression


@pytest.mark.parametrize("route", ROUTES)
def test_push_and_load_by_every_route(hub, owner, stranger, tmp_path, route):
    if "user/vector" not in hub.repos:
        save_vector(tmp_path)
        push(owner, tmp_path, "user/vector")
        files = set(hub.files("user/vector"))
        assert files == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert ("PUT", "/lfs-upload/") in {(m, p[:12]) for m, p in hub.requests}, "through LFS"
    check(stranger, ROUTES[route].format("'user/vector'"))


def test_what_transformers_pushes_loads_and_gets_our_card_later(hub, owner, stranger, tmp_path):
    save_vector(tmp_path)
    owner.run(f"PeftModel.from_pretrained(base(), {str(tmp_path)!r}).push_to_hub('user/direct')")
    for route in ROUTES.values():
        check(stranger, route.format("'user/direct'"))
    assert b"automatically generated" in hub.files("user/direct")["README.md"]
    push(owner, tmp_path, "user/direct")
    assert b"A steering vector for user/base" in hub.files("user/direct")["README.md"]


def test_offline_from_the_cache(hub, tmp_path, tmp_path_factory):
    save_vector(tmp_path)
    home = tmp_path_factory.mktemp("home")
    online = Client(hub.url, home, token=TOKEN)
    online.run(PRELUDE)
    push(online, tmp_path, "user/cached")
    for route in ROUTES.values():
        check(online, route.format("'user/cached'"))
    online.close()
    asked = len(hub.requests)
    offline = Client(hub.url, home, offline=True)
    offline.run(PRELUDE)
    for route in ROUTES.values():
        check(offline, route.format("'user/cached'"))
    report = (
        "from steer_adapter.sharing.inspection import inspect_adapters as i; result = i('user/cached')[0]['layers']"
    )
    assert [layer["layer"] for layer in offline.run(report)] == ["1", "3"]
    offline.close()
    assert len(hub.requests) == asked


def test_an_existing_repository_and_a_push_without_a_change(hub, owner, tmp_path):
    save_vector(tmp_path)
    first = push(owner, tmp_path, "user/twice")
    assert push(owner, tmp_path, "user/twice") == first and len(hub.repos["user/twice"].commits) == 2
    save_vector(tmp_path, seed=2)
    second = push(owner, tmp_path, "user/twice")
    assert second != first
    check(owner, ROUTES["PeftModel"].format("'user/twice'"), seed=2)
    check(owner, ROUTES["PeftModel"].format(f"'user/twice', revision={first!r}"))


def test_branches_and_pinned_revisions(owner, stranger, tmp_path):
    save_vector(tmp_path / "one")
    save_vector(tmp_path / "two", seed=2)
    push(owner, tmp_path / "one", "user/branches")
    oid = push(owner, tmp_path / "two", "user/branches", revision="stronger")
    for revision in ("stronger", oid):
        check(stranger, f"PeftModel.from_pretrained(base(), 'user/branches', revision={revision!r})", seed=2)
        check(stranger, f"AutoPeftModelForCausalLM.from_pretrained('user/branches', revision={revision!r})", seed=2)
        check(stranger, f"native('user/branches', revision={revision!r})", seed=2)
    check(stranger, "PeftModel.from_pretrained(base(), 'user/branches')")
    with pytest.raises(ClientError, match="nowhere|Can't find|Revision"):
        stranger.run("PeftModel.from_pretrained(base(), 'user/branches', revision='nowhere')")


def test_a_private_repository(hub, owner, stranger, tmp_path):
    save_vector(tmp_path)
    push(owner, tmp_path, "user/private", private=True)
    assert hub.repos["user/private"].private
    check(owner, ROUTES["AutoPeftModel"].format("'user/private'"))
    for token in (None, "hf_wrong"):
        with pytest.raises(ClientError, match="^ValueError: Can't find 'adapter_config.json' at 'user/private'"):
            stranger.run(f"PeftModel.from_pretrained(base(), 'user/private', token={token!r})")
    check(stranger, f"PeftModel.from_pretrained(base(), 'user/private', token={TOKEN!r})")
    stranger.run("model = base(); before = logits(model)")
    with pytest.raises(ClientError, match="^VectorError: user/private: received no access"):
        stranger.run("PeftModel.from_pretrained(model, 'user/private')")
    assert stranger.run("result = before == logits(model)"), "in the cache by now, but not to be had"
    with pytest.raises(ClientError, match="^OutputError: Pushing .* failed .*401"):
        push(stranger, tmp_path, "user/private")


def test_a_library(owner, stranger, tmp_path):
    save_vector(tmp_path, seed=1, adapter="calm")
    save_vector(tmp_path, seed=2, adapter="blunt")
    push(owner, tmp_path, "user/library")
    check(stranger, "PeftModel.from_pretrained(base(), 'user/library', subfolder='blunt')", seed=2)
    check(stranger, "load_adapters(base(), 'user/library', names=['calm'])")
    stranger.run("model = load_adapters(base(), 'user/library'); result = sorted(model.peft_config)")
    for name, seed in (("calm", 1), ("blunt", 2)):
        stranger.run(f"model.set_adapter({name!r})")
        check(stranger, "model", seed=seed)
    with pytest.raises(ClientError, match="^AdapterNameError: .*expected some of .'blunt', 'calm'"):
        stranger.run("load_adapters(base(), 'user/library', names=['../calm'])")


def test_a_subfolder_offline(hub, tmp_path, tmp_path_factory):
    save_vector(tmp_path, seed=1, adapter="calm")
    home = tmp_path_factory.mktemp("home")
    online = Client(hub.url, home, token=TOKEN)
    online.run(PRELUDE)
    push(online, tmp_path, "user/cached-library")
    check(online, "PeftModel.from_pretrained(base(), 'user/cached-library', subfolder='calm')")
    hub.fault = lambda method, path: 503 if "/user/cached-library/resolve" in path and method == "HEAD" else None
    online.run("model = base(); before = logits(model)")
    with pytest.raises(ClientError, match="^VectorError: .*the Hub can't be reached"):
        online.run("PeftModel.from_pretrained(model, 'user/cached-library', subfolder='calm', local_files_only=True)")
    assert online.run("result = before == logits(model) and not hasattr(model, 'peft_config')")
    online.close()
    offline = Client(hub.url, home, offline=True)
    offline.run(PRELUDE)
    check(offline, "native('user/cached-library', subfolder='calm')")
    check(offline, "load_adapters(base(), 'user/cached-library', names=['calm'])")
    for load in ("PeftModel.from_pretrained(model", "first.load_adapter("):
        offline.run("model = base(); before = logits(model)")
        offline.run("from peft import get_peft_model; first = get_peft_model(base(), steer_adapter.SteerConfig())")
        call = f"{load}, 'user/cached-library', adapter_name='x', subfolder='calm')".replace("(,", "(")
        with pytest.raises(ClientError, match="^VectorError: .*Pass the folder in the cache") as error:
            offline.run(call)
        assert offline.run("result = before == logits(model) and not hasattr(model, 'peft_config')")
        assert offline.run("result = list(first.peft_config)") == ["default"]
    folder = str(error.value).split("instead: ")[1].rstrip(".")
    check(offline, f"PeftModel.from_pretrained(base(), {folder})")
    offline.close()


def test_a_library_of_thousands_fetches_the_vectors_alone(hub, stranger, tmp_path):
    for path, seed in (("calm", 1), ("customers/17", 2)):
        save_vector(tmp_path / path, seed=seed)
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md")
    files = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.name in names}
    repo = hub.repos["user/personas"] = type(hub).new_repo()
    repo.commit("main", {name: path.read_bytes() for name, path in files.items()})
    first = len(hub.requests)
    stranger.run("from steer_adapter import load_library; library = load_library('user/personas')")
    assert stranger.run("result = library.names") == ["calm", "customers/17"]
    for name, seed in (("calm", 1), ("customers/17", 2)):
        received = stranger.run(f"result = {{k: v.tolist() for k, v in library[{name!r}].items()}}")
        wanted = random_vectors(LAYERS, seed=seed)
        assert all(torch.equal(torch.tensor(received[str(layer)]), wanted[layer]) for layer in LAYERS)
    fetched = [path for _, path in hub.requests[first:] if "/resolve/" in path]
    assert len(fetched) >= 4 and not any("README" in path for path in fetched)


def test_the_card_on_the_hub(hub, owner, stranger, tmp_path):
    save_vector(tmp_path)
    push(owner, tmp_path, "user/card")
    card = ModelCard(hub.files("user/card")["README.md"].decode())
    assert card.data.base_model == "user/base" and card.data.base_model_relation == "adapter"
    assert "base_model:adapter:user/base" in card.data.tags and str(tmp_path) not in card.content
    (snippet,) = card.content.split("```python\n")[1:]
    printed = "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n    exec({!r}, {{}})\n"
    assert stranger.run(printed.format(snippet.partition("```")[0]) + "result = out.getvalue()").strip()


def test_a_card_that_was_edited_on_the_hub_stays(hub, owner, tmp_path):
    save_vector(tmp_path)
    push(owner, tmp_path, "user/edited")
    card = ModelCard(hub.files("user/edited")["README.md"].decode())
    card.data.license = "mit"
    files = dict(hub.files("user/edited"), **{"README.md": str(card).encode()})
    hub.repos["user/edited"].commit("main", files)
    save_vector(tmp_path, seed=2)
    push(owner, tmp_path, "user/edited")
    assert ModelCard(hub.files("user/edited")["README.md"].decode()).data.license == "mit"

    edited = hub.files("user/edited")["README.md"] + b"\nMy own words.\n"
    hub.repos["user/edited"].commit("main", dict(hub.files("user/edited"), **{"README.md": edited}))
    save_vector(tmp_path, seed=3)
    push(owner, tmp_path, "user/edited")
    assert hub.files("user/edited")["README.md"] == edited
    check(owner, ROUTES["PeftModel"].format("'user/edited'"), seed=3)
    push(owner, tmp_path, "user/edited", overwrite_card=True)
    assert b"My own words" not in hub.files("user/edited")["README.md"]


STEPS = {"create": "/api/repos/create", "preupload": "/preupload/", "batch": "/objects/batch", "put": "/lfs-upload/",
         "verify": "/lfs-verify", "commit": "/commit/"}  # fmt: skip


@pytest.mark.parametrize("fault", ["cut", 503])
@pytest.mark.parametrize("step", STEPS)
def test_a_push_that_breaks_leaves_nothing_half_done(hub, owner, tmp_path, step, fault):
    repo = f"user/broken-{step}-{fault}"
    save_vector(tmp_path, seed=len(hub.blobs) + 10)
    seed = len(hub.blobs) + 10
    hits = []

    def breaks(method: str, path: str) -> object:
        if STEPS[step] in path and len(hits) < 1:
            hits.append(path)
            return fault
        return None

    hub.fault = breaks
    try:
        push(owner, tmp_path, repo)
    except ClientError as error:
        assert str(error).startswith(f"OutputError: Pushing {tmp_path} to {repo!r} failed"), error
        assert "adapter_config.json" not in (hub.files(repo) if repo in hub.repos else {})
        push(owner, tmp_path, repo)
    assert hits, "the fault was met"
    check(owner, ROUTES["PeftModel"].format(repr(repo)), seed=seed)


@pytest.mark.parametrize("fault", ["cut", 503])
@pytest.mark.parametrize("file", ["adapter_config.json", "/blob/"])
def test_a_download_that_breaks(hub, owner, tmp_path, file, fault):
    repo = f"user/down-{file.strip('/').partition('.')[0]}-{fault}"
    seed = len(hub.blobs) + 100
    save_vector(tmp_path, seed=seed)
    push(owner, tmp_path, repo)
    hits = []

    def breaks(method: str, path: str) -> object:
        if method == "GET" and file in path and len(hits) < 1:
            hits.append(path)
            return fault
        return None

    hub.fault = breaks
    owner.run("model = base(); before = logits(model)")
    try:
        check(owner, f"PeftModel.from_pretrained(model, {repo!r})", seed=seed)
    except ClientError:
        assert owner.run("result = before == logits(model)"), "the model is as it was"
        check(owner, f"PeftModel.from_pretrained(model, {repo!r})", seed=seed)
    assert hits


def test_the_trainer_pushes(hub, owner, stranger, tmp_path):
    code = f"""
import json
from datasets import Dataset
from steer_adapter import BiPOConfig, BiPOTrainer, SteerConfig
rows = [dict(prompt=f"w{{i}}", chosen=f"w{{i + 1}} w3", rejected=f"w{{i + 2}}") for i in range(8)]
trainer = BiPOTrainer(
    model=base(), train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained("user/base"),
    peft_config=SteerConfig(layers_to_transform=1, task_type="CAUSAL_LM"),
    args=BiPOConfig(output_dir={str(tmp_path)!r}, max_steps=2, report_to="none", use_cpu=True, save_strategy="no",
                    hub_model_id="user/trained"),
)
trainer.train()
trainer.push_to_hub()
trainer.model.eval()
result = logits(trainer.model)
"""
    trained = torch.tensor(owner.run(code))
    received = torch.tensor(stranger.run("result = logits(AutoPeftModelForCausalLM.from_pretrained('user/trained'))"))
    assert (received - trained).abs().max() <= 1e-5
    files = hub.files("user/trained")
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "user/base"
    assert config["revision"] == hub.repos["user/base"].refs["main"]
    assert config["provenance"]["method"] == "bipo" and config["provenance"]["seed"] == 42
    assert "BiPO" in files["README.md"].decode() and "trl" in files["README.md"].decode()
