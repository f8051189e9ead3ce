"""Thousands of vectors in one tensor, picked row by row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, hand_logits, make_model, random_vectors, set_vectors
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from steer_adapter import SteerConfig, SteerLayer, load_library, steering
from steer_adapter.errors import AdapterNameError, ModelError


# Name: layers, seed, saved multiplier.
PERSONAS = {"cheerful": ([1, 2], 3, 1.0), "customers/17": ([2], 4, 2.5), "honest": ([0, 3], 5, -1.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("library")
    for name, (layers, seed, multiplier) in PERSONAS.items():
        model = get_peft_model(make_model(), SteerConfig(layers_to_transform=layers, multiplier=multiplier))
        set_vectors(model, random_vectors(layers, seed=seed))
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def library(folder):
    return load_library(folder)


def row_by_hand(ids, name, multiplier=None):
    if name == "__base__":
        return hand_logits(make_model(), ids, {})
    layers, seed, saved = PERSONAS[name]
    strength = saved if multiplier is None else multiplier
    return hand_logits(make_model(), ids, {k: strength * v for k, v in random_vectors(layers, seed=seed).items()})


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def test_what_it_holds(library):
    assert library.names == ("cheerful", "customers/17", "honest")
    assert len(library) == 3 and "customers/17" in library and "17" not in library
    assert library.table.shape == (5, HIDDEN) and library.table.dtype == torch.float32
    assert library.layers == [0, 1, 2, 3]
    for name, (layers, seed, _) in PERSONAS.items():
        assert library[name].keys() == set(layers)
        for layer, vector in random_vectors(layers, seed=seed).items():
            assert torch.equal(library[name][layer], vector)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: get_peft_model(m, LoraConfig(target_modules=["q_proj"]))])
def test_each_row_its_own(library, input_ids, wrap):
    model = wrap(make_model()).eval()
    library.attach(model)
    assert torch.equal(logits(model, input_ids), logits(make_model(), input_ids)), "nothing outside a block"
    rows = torch.cat([input_ids, input_ids.flip(1)])
    names = ["honest", "customers/17", "__base__", "cheerful"]
    with steering(model, adapter_names=names):
        received = logits(model, rows)
    wanted = torch.cat([row_by_hand(rows[i : i + 1], name) for i, name in enumerate(names)])
    assert (received - wanted).abs().max() <= 1e-5
    with steering(model, [2.0, -1.0, 5.0, 0.5], adapter_names=names):
        received = logits(model, rows)
    wanted = torch.cat([row_by_hand(rows[i : i + 1], names[i], m) for i, m in enumerate([2.0, -1.0, 5.0, 0.5])])
    assert (received - wanted).abs().max() <= 1e-5
    with steering(model, {"honest": 3.0}, adapter_names=names):
        received = logits(model, rows)
    assert (received[:1] - row_by_hand(rows[:1], "honest", 3.0)).abs().max() <= 1e-5
    assert (received[1:2] - row_by_hand(rows[1:2], "customers/17")).abs().max() <= 1e-5


def test_beside_adapters(library, input_ids):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[1])).eval()
    vectors = random_vectors([1])
    set_vectors(model, vectors)
    library.attach(model)
    with steering(model, adapter_names=["default", "cheerful"]):
        received = logits(model, input_ids)
    assert (received[:1] - hand_logits(make_model(), input_ids[:1], vectors)).abs().max() <= 1e-5
    assert (received[1:] - row_by_hand(input_ids[1:], "cheerful")).abs().max() <= 1e-5
    with model.disable_adapter(), steering(model, adapter_names=["default", "cheerful"]):
        assert torch.equal(logits(model, input_ids), logits(make_model(), input_ids))
    library.detach(model)
    assert (logits(model, input_ids) - hand_logits(make_model(), input_ids, vectors)).abs().max() <= 1e-5
    assert sum(isinstance(module, SteerLayer) for module in model.modules()) == 1


def test_detaching_leaves_no_trace(library):
    model = make_model()
    before = [name for name, _ in model.named_modules()]
    library.attach(model)
    library.detach(model)
    assert [name for name, _ in model.named_modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_generation_with_beams(library, input_ids):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    library.attach(model)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    with steering(model, adapter_names=["honest", "cheerful"]):
        together = model.generate(input_ids=input_ids, **options)
    for row, name in enumerate(["honest", "cheerful"]):
        with steering(model, adapter_names=[name]):
            assert torch.equal(model.generate(input_ids=input_ids[row : row + 1], **options)[0], together[row])
        assert not torch.equal(model.generate(input_ids=input_ids[row : row + 1], **options)[0], together[row])
    with steering(model, adapter_names=["honest"] * 3 + ["cheerful"] * 3):
        model.generate(input_ids=input_ids, num_beams=3, **options)


def test_scopes(folder, tmp_path, input_ids):
    shutil.copytree(folder, tmp_path / "library")
    for name, scope in (("cheerful", "prompt"), ("honest", "completion")):
        path = tmp_path / "library" / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "token_scope": scope}))
    library = load_library(tmp_path / "library")
    model = make_model()
    library.attach(model)
    rows = torch.cat([input_ids, input_ids[:1]])
    with steering(model, adapter_names=["cheerful", "honest", "customers/17"], prompt_lengths=[3, 4, 5]):
        received = logits(model, rows)
    for row, (name, length) in enumerate([("cheerful", 3), ("honest", 4)]):
        single = PeftModel.from_pretrained(make_model(), tmp_path / "library" / name)
        with steering(single, prompt_lengths=[length]):
            assert (received[row] - logits(single, rows[row : row + 1])[0]).abs().max() <= 1e-5
    assert (received[2:] - row_by_hand(rows[2:], "customers/17")).abs().max() <= 1e-5


def test_compiled(library, input_ids):
    torch._dynamo.reset()
    model = make_model()
    library.attach(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for names in (["honest", "customers/17"], ["__base__", "cheerful"]):
        with torch.no_grad(), steering(model, adapter_names=names):
            received = compiled(input_ids).logits
        wanted = torch.cat([row_by_hand(input_ids[i : i + 1], name) for i, name in enumerate(names)])
        assert (received - wanted).abs().max() <= 1e-5


def test_mistakes(library, input_ids):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=HIDDEN, n_layer=3, n_head=4))
    with pytest.raises(ModelError, match="num_hidden_layers=4, but GPT2LMHeadModel has 32 and 3"):
        library.attach(other)
    model = make_model()
    library.attach(model)
    with pytest.raises(ModelError, match="carries a library already"):
        library.attach(model)
    with (
        pytest.raises(
            AdapterNameError, match=r"non-existing adapter\(s\): nobody; expected names from .* or the library"
        ),
        steering(model, adapter_names=["nobody"]),
    ):
        pass
    with (
        pytest.raises(AdapterNameError, match=r"non-existing adapter\(s\): cheerful"),
        steering(model, {"cheerful": 1.0}),
    ):
        pass
    with pytest.raises(AdapterNameError, match="a name in the library"):
        get_peft_model(model, SteerConfig(layers_to_transform=1), adapter_name="cheerful")
    named = get_peft_model(make_model(), SteerConfig(layers_to_transform=1), adapter_name="honest")
    with pytest.raises(AdapterNameError, match=r"\['honest'\], which are names in the library"):
        library.attach(named)


class Kernels(TorchDispatchMode):
    """The operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_what_was_picked_is_added_and_nothing_else(library):
    model = make_model()
    library.attach(model)
    steer_layer, hidden = model.model.layers[2].steering, torch.randn(2, 5, HIDDEN)
    with torch.no_grad(), steering(model, adapter_names=["cheerful", "customers/17"]):
        wanted = steer_layer(hidden)
        with Kernels() as kernels:
            received = steer_layer(hidden)
    assert torch.equal(received, wanted) and not torch.equal(received, hidden)
    assert kernels.names.count("add") == 1 and not {"mul", "ones", "fill_"} & set(kernels.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_an_adapter_of_the_same_layer_each_row_is_as_alone(library, dtype):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[2])).eval()
    set_vectors(model, random_vectors([2], seed=9))
    library.attach(model)
    steer_layer, hidden = model.base_model.model.model.layers[2].steering, torch.randn(1, 5, HIDDEN).to(dtype)
    names = ["default", "customers/17"]
    with torch.no_grad(), steering(model, adapter_names=names):
        received = steer_layer(hidden.expand(2, -1, -1))
    deltas = [random_vectors([2], seed=9)[2], 2.5 * random_vectors([2], seed=4)[2]]
    for row, delta in enumerate(deltas):
        assert torch.equal(received[row], (hidden + delta.to(dtype))[0])
