"""Vectors trained and loaded on LoRA-finetuned models of every kind; the LoRA stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, random_vectors, set_vectors, steered_by_hand
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from steer_adapter import SteerConfig, verify
from steer_adapter.errors import ModelError


pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:You are trying to modify a model with PEFT for a second time"
)
LAYERS = [1, 3]
KEYS = {f"base_model.model.model.layers.{layer}.steering.steer_vector" for layer in LAYERS}
# Wide enough for the blocks of 64 weights in which nf4 scales.
CONFIG = LlamaConfig(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = ["lora", "dora", "rslora and bias", "modules_to_save", "nf4"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.15)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fresh(base_dir: Path, kind: str) -> Callable[[], PreTrainedModel]:
    def load() -> PreTrainedModel:
        if kind != "nf4":
            return AutoModelForCausalLM.from_pretrained(base_dir).eval()
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=quantization, device_map="cpu")
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False).eval()

    return load


def lora_config(kind: str) -> LoraConfig:
    extra = {
        "dora": {"use_dora": True},
        "rslora and bias": {"use_rslora": True, "bias": "lora_only"},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
    }
    return LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, **extra.get(kind, {}))


@pytest.fixture
def lora_dir(fresh: Callable[[], PreTrainedModel], kind: str, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    get_peft_model(fresh(), lora_config(kind), adapter_name="low_rank").save_pretrained(tmp_path / "lora")
    return tmp_path / "lora" / "low_rank"


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """With gradients, in training mode (nothing drops out): else bitsandbytes computes otherwise on a CPU."""
    return model.train()(input_ids).logits.detach()


def train(model: nn.Module, input_ids: torch.Tensor, steps: int = 2) -> None:
    """A few steps, after which every trainable parameter must have moved and no other."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model.train()(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert parameter.requires_grad == ("steer_vector" in name), name


def vectors_of(folder: Path) -> dict[int, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == KEYS
    return {int(key.split(".")[4]): tensor for key, tensor in tensors.items()}


def test_trained_around_a_lora(fresh, lora_dir, input_ids, tmp_path):
    tuned = PeftModel.from_pretrained(fresh(), lora_dir, adapter_name="low_rank")
    before = logits(tuned, input_ids)
    model = get_peft_model(tuned, SteerConfig(layers_to_transform=LAYERS))
    train(model, input_ids)
    steered = logits(model, input_ids)
    model.save_pretrained(tmp_path / "vector")
    tuned.save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again" / "low_rank") == weights(lora_dir)
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids), before), "the reference is the finetuned model"

    reference = PeftModel.from_pretrained(fresh(), lora_dir, adapter_name="low_rank")
    with steered_by_hand(reference.get_base_model(), vectors_of(tmp_path / "vector")):
        assert (logits(reference, input_ids) - steered).abs().max() <= 1e-4
    assert (steered - before).abs().max() > 0.05 and verify(model)


def test_trained_on_natively_loaded_adapters(fresh, lora_dir, kind, input_ids, tmp_path):
    model = fresh()
    model.load_adapter(lora_dir, "low_rank")
    before = logits(model, input_ids)
    assert (before - logits(fresh(), input_ids)).abs().max() > 0.05
    steered = get_peft_model(model, SteerConfig(layers_to_transform=LAYERS), adapter_name="happy")
    train(steered, input_ids)
    steered.save_pretrained(tmp_path, selected_adapters=["happy"])
    vectors = vectors_of(tmp_path / "happy")
    after = logits(steered, input_ids)
    with steered.disable_adapter():
        assert torch.equal(logits(steered, input_ids), before)
    assert steered.unload() is model and list(model.peft_config) == ["low_rank"]
    with steered_by_hand(model, vectors):
        assert (logits(model, input_ids) - after).abs().max() <= 1e-4


# Not DoRA, whose magnitudes transformers does not load, and not modules_to_save, beside which it activates no other.
@pytest.mark.parametrize("kind", ["lora", "rslora and bias", "nf4"], indirect=True)
@pytest.mark.parametrize("order", ["lora first", "vector first"])
def test_loaded_natively_saved_and_deleted(fresh, lora_dir, kind, input_ids, tmp_path, order):
    vector = get_peft_model(fresh(), SteerConfig(layers_to_transform=LAYERS))
    set_vectors(vector, random_vectors(LAYERS, 64))
    vector.save_pretrained(tmp_path / "vector")
    model, lora_only = fresh(), fresh()
    lora_only.load_adapter(lora_dir, "low_rank")
    tuned = logits(lora_only, input_ids)
    loads = [(lora_dir, "low_rank"), (tmp_path / "vector", "happy")]
    for folder, name in loads if order == "lora first" else reversed(loads):
        model.load_adapter(folder, name)
    model.set_adapter(["low_rank", "happy"])
    with steered_by_hand(lora_only, random_vectors(LAYERS, 64)):
        assert (logits(model, input_ids) - logits(lora_only, input_ids)).abs().max() <= 1e-4
    for name, folder in (("low_rank", lora_dir), ("happy", tmp_path / "vector")):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        saved, wanted = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / name, folder))
        assert saved.keys() == wanted.keys() and all(torch.equal(saved[key], wanted[key]) for key in saved)
    model.set_adapter(["low_rank", "happy"])
    model.delete_adapter("happy")
    assert (logits(model, input_ids) - tuned).abs().max() <= 1e-5
    assert not any("steer_vector" in key for key in model.state_dict())


@pytest.mark.parametrize("kind", ["lora", "dora"], indirect=True)
def test_trained_on_a_merged_lora(fresh, lora_dir, input_ids, tmp_path):
    merged = PeftModel.from_pretrained(fresh(), lora_dir).merge_and_unload()
    before = logits(merged, input_ids)
    model = get_peft_model(merged, SteerConfig(layers_to_transform=LAYERS))
    train(model, input_ids)
    model.save_pretrained(tmp_path)
    with steered_by_hand(merged, vectors_of(tmp_path)), model.disable_adapter():
        by_hand = logits(merged, input_ids)
    assert (logits(model, input_ids) - by_hand).abs().max() <= 1e-4
    assert (by_hand - before).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_the_lora_is_trained_on_while_the_vector_rests(fresh, kind, input_ids, tmp_path):
    """The other way round: a LoRA on a steered model."""
    steered = get_peft_model(fresh(), SteerConfig(layers_to_transform=LAYERS, inference_mode=True))
    set_vectors(steered, random_vectors(LAYERS, 64))
    model = get_peft_model(steered, lora_config(kind))
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    model(input_ids, labels=input_ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_trained_tokens_are_refused_before_anything_is_changed(fresh, kind, input_ids):
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    tuned = get_peft_model(fresh(), config)
    before = logits(tuned, input_ids)
    with pytest.raises(ModelError, match="`trainable_token_indices`, expected none"):
        get_peft_model(tuned, SteerConfig(layers_to_transform=LAYERS))
    assert not any("steering" in name for name, _ in tuned.named_modules())
    assert torch.equal(logits(tuned, input_ids), before)
    get_peft_model(tuned.merge_and_unload(), SteerConfig(layers_to_transform=LAYERS))  # the way that the message names
