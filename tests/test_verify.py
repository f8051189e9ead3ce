from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from conftest import make_model, random_vectors, set_vectors
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, OpenAIGPTConfig

from steer_adapter import SteerConfig, verify
from steer_adapter.errors import ModelError


@pytest.fixture
def model():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[1, 2], multiplier=-2.0))
    set_vectors(model, random_vectors([1, 2]))
    return model


def test_all_is_well(model):
    result = verify(model)
    assert result and len(result.arrivals) == 2
    first = result.arrivals[0]
    assert (first.adapter, first.multiplier, first.reason) == ("default", -2.0, "")
    assert first.layer == "base_model.model.model.layers.1"
    assert first.norm == pytest.approx(float(random_vectors([1])[1].norm()))
    assert "default at base_model.model.model.layers.1: multiplier -2" in str(result)


def test_the_dose_is_relative_to_the_mean_norm(model):
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        hidden = make_model()(ids, output_hidden_states=True).hidden_states[2]
    wanted = 2.0 * random_vectors([1])[1].norm() / hidden.norm(dim=-1).mean()
    assert verify(model).arrivals[0].dose == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda model: model.base_model.disable_adapter_layers(), "disabled"),
        (lambda model: model.set_multiplier(0.0), "zero"),
        (lambda model: set_vectors(model, {1: torch.full((32,), float("nan"))}), "never arrived"),
        (lambda model: model.base_model.model.model.layers[1]._forward_hooks.clear(), "did not run"),
        (lambda model: set_vectors(model, {1: torch.full((32,), 1e-30)}), "did not change"),
    ],
)
def test_what_goes_wrong_is_named(model, damage, reason):
    damage(model)
    result = verify(model)
    assert not result
    assert reason in result.arrivals[0].reason and "DOES NOT ARRIVE" in str(result)


def test_the_model_is_left_as_it_was(model):
    hooks = [len(m._forward_hooks) for m in model.modules()]
    model.train()
    model.get_base_model().eval()
    modes = [m.training for m in model.modules()]
    verify(model)
    assert len(set(modes)) == 2 and [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())


def test_on_inputs_of_ones_own(model):
    assert verify(model, {"inputs_embeds": torch.randn(1, 4, 32)})


def test_layers_that_return_lists():
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=3, n_head=4)
    steered = get_peft_model(AutoModelForCausalLM.from_config(config), SteerConfig(layers_to_transform=1))
    set_vectors(steered, random_vectors([1]))
    assert verify(steered)


def test_a_model_that_takes_no_token_ids():
    block = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ModelError, match="takes no token ids: pass verify"):
        verify(get_peft_model(block, SteerConfig(target_modules=["0"], hidden_size=4)))


@pytest.mark.parametrize("embeddings", [None, nn.Identity()])
def test_a_model_without_token_embeddings(model, embeddings):
    model.get_base_model().get_input_embeddings = lambda: embeddings
    with pytest.raises(ModelError, match="takes no token ids: pass verify"):
        verify(model)


def test_a_model_offloaded_to_the_cpu():
    model = cpu_offload(make_model(), execution_device="cpu")
    steered = get_peft_model(model, SteerConfig(layers_to_transform=1))
    set_vectors(steered, random_vectors([1]))
    assert model.get_input_embeddings().weight.is_meta
    assert verify(steered)


def test_around_a_lora(tmp_path, model):
    model.save_pretrained(tmp_path)
    tuned = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="no steering vectors"):
        verify(tuned)
    assert verify(PeftModel.from_pretrained(tuned, tmp_path))
