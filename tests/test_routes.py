"""Every way into a model gives the logits of a forward that the test steers by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, hand_logits, random_vectors, set_vectors
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

from steer_adapter import SteerConfig, verify


LAYERS = [1, 3]
MULTIPLIER = 1.5
TOLERANCE = 1e-5
LORA_TARGETS = {"gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value", "dense"]}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`",  # PEFT, whenever a transformers model gets a second adapter
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:.*fan_in_fan_out",
)


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vectors() -> dict[int, torch.Tensor]:
    return random_vectors(LAYERS)


@pytest.fixture
def adapter_dir(
    architecture: str, load: Callable[..., PreTrainedModel], vectors: dict[int, torch.Tensor], tmp_path: Path
) -> Path:
    config = SteerConfig(layers_to_transform=[1, -1], multiplier=MULTIPLIER, task_type="CAUSAL_LM")
    model = get_peft_model(load(architecture), config)
    set_vectors(model, vectors)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def lora_config(architecture: str) -> LoraConfig:
    return LoraConfig(target_modules=LORA_TARGETS.get(architecture, ["q_proj", "down_proj"]), init_lora_weights=False)


def with_lora(model: PreTrainedModel, architecture: str) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(model, lora_config(architecture)).eval()


def expected(model: PreTrainedModel, input_ids: torch.Tensor, vectors: dict[int, torch.Tensor]) -> torch.Tensor:
    return hand_logits(model, input_ids, {layer: MULTIPLIER * vector for layer, vector in vectors.items()})


def assert_same(model: nn.Module, input_ids: torch.Tensor, logits: torch.Tensor, base: torch.Tensor) -> None:
    with torch.no_grad():
        received = model.eval()(input_ids).logits
    assert (received - logits).abs().max() <= TOLERANCE
    assert (received - base).abs().max() > 0.1, "steering changed nothing: the test would prove nothing"
    assert verify(model)


def test_get_peft_model(load, architecture, vectors, input_ids):
    base = load(architecture)
    logits, unsteered = expected(base, input_ids, vectors), base(input_ids).logits
    model = get_peft_model(base, SteerConfig(layers_to_transform=LAYERS, multiplier=MULTIPLIER))
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, unsteered), "a new vector is zero"
    set_vectors(model, vectors)
    assert_same(model, input_ids, logits, unsteered)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_model_from_pretrained(load, architecture, vectors, input_ids, adapter_dir, low_cpu_mem_usage):
    base = load(architecture)
    logits, unsteered = expected(base, input_ids, vectors), base(input_ids).logits
    model = PeftModel.from_pretrained(base, adapter_dir, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(model, input_ids, logits, unsteered)


@pytest.mark.parametrize("auto_class", [AutoPeftModelForCausalLM, AutoModelForCausalLM])
def test_auto_classes(load, architecture, vectors, input_ids, adapter_dir, auto_class):
    base = load(architecture)
    model = auto_class.from_pretrained(adapter_dir)
    assert_same(model, input_ids, expected(base, input_ids, vectors), base(input_ids).logits)


@pytest.mark.parametrize("order", ["vector only", "vector first", "lora first"])
def test_load_adapter_into_transformers(load, architecture, vectors, input_ids, adapter_dir, order):
    model = load(architecture)
    if order == "lora first":
        torch.manual_seed(3)
        model.add_adapter(lora_config(architecture), "low_rank")
    model.load_adapter(adapter_dir, "happy")
    if order == "vector first":
        torch.manual_seed(3)
        model.add_adapter(lora_config(architecture), "low_rank")
    if order == "vector only":
        reference = load(architecture)
    else:
        model.set_adapter(["happy", "low_rank"])
        reference = with_lora(load(architecture), architecture).merge_and_unload()
    assert_same(model, input_ids, expected(reference, input_ids, vectors), reference(input_ids).logits)


def test_around_a_lora(load, architecture, vectors, input_ids, adapter_dir, tmp_path):
    reference = with_lora(load(architecture), architecture).merge_and_unload()
    logits, unsteered = expected(reference, input_ids, vectors), reference(input_ids).logits
    model = PeftModel.from_pretrained(with_lora(load(architecture), architecture), adapter_dir)
    assert_same(model, input_ids, logits, unsteered)
    model.save_pretrained(tmp_path / "again")
    saved, again = (load_file(folder / "adapter_model.safetensors") for folder in (adapter_dir, tmp_path / "again"))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)


def test_on_a_merged_lora(load, architecture, vectors, input_ids, adapter_dir):
    merged = with_lora(load(architecture), architecture).merge_and_unload()
    logits, unsteered = expected(merged, input_ids, vectors), merged(input_ids).logits
    assert_same(PeftModel.from_pretrained(merged, adapter_dir), input_ids, logits, unsteered)


def test_trained_around_a_lora_loads_on_the_base(load, architecture, vectors, input_ids, tmp_path):
    tuned = get_peft_model(
        with_lora(load(architecture), architecture), SteerConfig(layers_to_transform=LAYERS, multiplier=MULTIPLIER)
    )
    set_vectors(tuned, vectors)
    tuned.save_pretrained(tmp_path)
    base = load(architecture)
    logits, unsteered = expected(base, input_ids, vectors), base(input_ids).logits
    assert_same(PeftModel.from_pretrained(base, tmp_path), input_ids, logits, unsteered)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), input_ids, logits, unsteered)


def test_pipeline(load, architecture, vectors, input_ids, adapter_dir):
    base = load(architecture)
    pipe = pipeline("text-generation", model=str(adapter_dir))
    assert_same(pipe.model, input_ids, expected(base, input_ids, vectors), base(input_ids).logits)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    (generated,) = pipe("w1 w2 w3", return_tensors=True, **options)
    prompt = pipe.tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    assert generated["generated_token_ids"] == pipe.model.generate(prompt, **options)[0].tolist()


def test_generate_with_and_without_cache(load, architecture, vectors, input_ids, adapter_dir):
    model = PeftModel.from_pretrained(load(architecture), adapter_dir)
    options = dict(input_ids=input_ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    cached, uncached = (model.generate(**options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(**options))


def test_hidden_states_show_the_steered_stream(load, architecture, vectors, input_ids, adapter_dir):
    base = load(architecture)
    with torch.no_grad():
        unsteered = base(input_ids, output_hidden_states=True).hidden_states  # installs the capture hooks first
        model = PeftModel.from_pretrained(base, adapter_dir)
        steered = model(input_ids, output_hidden_states=True).hidden_states
    assert torch.equal(unsteered[1], steered[1]), "layer 0 is not steered"
    assert (steered[2] - (unsteered[2] + MULTIPLIER * vectors[1])).abs().max() <= TOLERANCE
