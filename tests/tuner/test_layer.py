"""What happens at one decoder layer."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from conftest import HIDDEN, hand_logits, make_model, random_vectors, set_vectors
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPTJConfig, MptConfig

from steer_adapter import SteerConfig, SteerLayer
from steer_adapter.errors import ModelError, VectorError
from steer_adapter.tuner.layer import steer_output


def steered(layers=(1, 3), **kwargs):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=list(layers), **kwargs))
    set_vectors(model, random_vectors(list(layers)))
    return model


def steer_layers(model):
    return [module for module in model.modules() if isinstance(module, SteerLayer)]


TUPLES = [
    BloomConfig(vocab_size=96, hidden_size=HIDDEN, n_layer=2, n_head=4),
    FalconConfig(vocab_size=96, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4),
    GPTJConfig(vocab_size=96, n_embd=HIDDEN, n_layer=2, n_head=4, rotary_dim=4),
    MptConfig(vocab_size=96, d_model=HIDDEN, n_layers=2, n_heads=4),
]


@pytest.mark.parametrize("config", TUPLES, ids=lambda config: config.model_type)
def test_layers_that_return_tuples_are_steered(config, input_ids):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        base = model(input_ids, output_hidden_states=True).hidden_states
        model = get_peft_model(model, SteerConfig(layers_to_transform=0))
        vectors = random_vectors([0])
        set_vectors(model, vectors)
        received = model(input_ids, output_hidden_states=True).hidden_states
    assert (received[1] - (base[1] + vectors[0])).abs().max() <= 1e-5


def test_an_output_of_another_form_is_refused():
    layer = SteerLayer(HIDDEN)
    layer.update_layer("default", SteerConfig(init_weights=False), torch.device("cpu"))
    layer.set_adapter("default")
    with pytest.raises(ModelError, match=r"shape \[4, 2, 3, 32\], expected \[batch, tokens, 32\]"):
        layer(torch.zeros(4, 2, 3, HIDDEN))
    with pytest.raises(ModelError, match=r"shape \[2, 3, 8\]"):
        layer(torch.zeros(2, 3, 8))
    module = torch.nn.Linear(1, 1)
    layer.attach(module)
    received = steer_output(module, (), {}, [torch.zeros(1, 1, HIDDEN), "cache"])
    assert type(received) is list and torch.equal(received[0][0, 0], layer.steer_vector["default"])
    assert received[1] == "cache"
    with pytest.raises(ModelError, match="Linear returned dict"):
        steer_output(module, (), {}, {"hidden_states": torch.zeros(1, 1, HIDDEN)})


def test_a_vector_that_never_arrived_is_an_error(input_ids, tmp_path):
    steered().save_pretrained(tmp_path)
    save_file(
        {"base_model.model.nowhere.steering.steer_vector": torch.ones(HIDDEN)}, tmp_path / "adapter_model.safetensors"
    )
    model = make_model()
    model.load_adapter(tmp_path)  # transformers only reports missing keys
    with pytest.raises(VectorError, match="'default' holds NaN.*never arrived"):
        model(input_ids)


def test_so_is_a_random_one_in_its_place(input_ids, tmp_path):
    steered(init_weights=False).save_pretrained(tmp_path)
    save_file(
        {"base_model.model.nowhere.steering.steer_vector": torch.ones(HIDDEN)}, tmp_path / "adapter_model.safetensors"
    )
    model = make_model()
    model.load_adapter(tmp_path)
    with pytest.raises(VectorError, match="never arrived"):
        model(input_ids)


def test_a_vector_that_becomes_nan_is_noticed(input_ids):
    model = steered()
    model(input_ids)
    with torch.no_grad():
        steer_layers(model)[0].steer_vector["default"][3] = float("nan")
    with pytest.raises(VectorError, match="training diverged"):
        model(input_ids)


def test_finiteness_is_looked_at_once_for_each_version(input_ids, monkeypatch):
    model = steered()
    looks = []
    isfinite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda tensor: looks.append(1) or isfinite(tensor))
    for _ in range(3):
        model(input_ids)
    assert len(looks) == 2, "one for each layer"
    set_vectors(model, random_vectors([1], seed=5))
    model(input_ids)
    assert len(looks) == 3


def test_inference_mode(input_ids):
    with torch.inference_mode():
        model = steered()
        wanted = hand_logits(make_model(), input_ids, random_vectors([1, 3]))
        assert (model(input_ids).logits - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_vector_stays_float32_when_the_model_is_cast(dtype, input_ids):
    model = steered(multiplier=0.3).to(dtype)
    for layer in steer_layers(model):
        assert layer.steer_vector["default"].dtype == layer.multipliers["default"].dtype == torch.float32
        assert float(layer.multipliers["default"]) == pytest.approx(0.3, abs=1e-7)
    vectors = random_vectors([1, 3])
    assert torch.equal(steer_layers(model)[0].steer_vector["default"], vectors[1]), "not even rounded"
    assert model(input_ids).logits.dtype == dtype
    wanted = hand_logits(make_model().to(dtype), input_ids, {k: (0.3 * v).to(dtype) for k, v in vectors.items()})
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, wanted)


@pytest.mark.parametrize("native", [False, True])
def test_the_vector_is_loaded_as_float32_into_a_bfloat16_model(native, tmp_path, load):
    steered().save_pretrained(tmp_path)
    model = load(dtype=torch.bfloat16)
    if native:
        model.load_adapter(tmp_path)
    else:
        model = PeftModel.from_pretrained(model, tmp_path)
    vectors = random_vectors([1, 3])
    for layer, wanted in zip(steer_layers(model), vectors.values(), strict=True):
        assert layer.steer_vector["default"].dtype == torch.float32
        assert torch.equal(layer.steer_vector["default"], wanted)


def test_a_small_step_is_not_lost_in_a_bfloat16_model(input_ids):
    model = steered().to(torch.bfloat16)
    vector = steer_layers(model)[0].steer_vector["default"]
    with torch.no_grad():
        vector.fill_(0.5)
    optimizer = torch.optim.SGD([vector], lr=1.0)
    vector.grad = torch.full_like(vector, 5e-4)
    optimizer.step()
    assert torch.allclose(vector, torch.tensor(0.5 - 5e-4))


def test_it_is_moved_with_the_model():
    model = steered().to("meta")
    assert all(p.is_meta and p.dtype == torch.float32 for layer in steer_layers(model) for p in layer.parameters())


def test_the_hook_survives_deepcopy_and_stays_with_its_model(input_ids):
    model = steered()
    clone = copy.deepcopy(model)
    set_vectors(model, random_vectors([1, 3], seed=9))
    with torch.no_grad():
        wanted = hand_logits(make_model(), input_ids, random_vectors([1, 3]))
        assert (clone(input_ids).logits - wanted).abs().max() <= 1e-5
        bare = clone.unload()
        del model
        gc.collect()
        assert torch.equal(bare(input_ids).logits, make_model()(input_ids).logits)
    assert not any(m._forward_hooks for m in bare.modules())


def test_it_has_no_weight_to_look_for():
    layer = SteerLayer(4)
    assert not hasattr(layer, "weight") and not hasattr(layer, "bias") and not hasattr(layer, "base_layer")
