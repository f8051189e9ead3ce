"""Where a bias adds to the residual stream last: found, proven, and refused on whatever is not exact."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from foldable import NONE, PLACES, build, same, snapshot
from peft import LoraConfig, get_peft_model
from test_architectures import IDS, LAYERS, encoder_decoder
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaConfig,
    MBartConfig,
)

from steer_adapter.errors import ModelError
from steer_adapter.tuner.places import biases_switched_on_by, complete, find_places


@pytest.mark.parametrize("name", list(PLACES))
def test_the_place_of(name):
    model, path = build(name)
    before = snapshot(model)
    places = find_places(model, [f"{path}.0", f"{path}.2"])
    assert same(snapshot(model), before)
    wanted, flag = PLACES[name]
    assert list(places) == [f"{path}.0", f"{path}.2"]
    for layer, place in places.items():
        assert place.projection is model.get_submodule(f"{layer}.{wanted}") and place.flag == flag
        assert place.scale == getattr(model.config, "residual_multiplier", 1.0)


@pytest.mark.parametrize("name", NONE)
def test_no_place_in(name):
    model, path = build(name)
    before = snapshot(model)
    with pytest.raises(ModelError, match="nothing was changed. Keep the adapter"):
        find_places(model, [f"{path}.1"])
    assert same(snapshot(model), before)


def test_post_norms_and_models_without_biases_have_none():
    assert {"gemma2", "gemma3_text", "olmo2", "mistral", "mpt"} <= set(NONE)


def test_encoder_decoders():
    arguments = dict(
        IDS, d_model=32, encoder_layers=2, decoder_layers=LAYERS, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    )  # fmt: skip
    pre_norm, post_norm = (encoder_decoder(config(**arguments))() for config in (MBartConfig, BartConfig))
    (place,) = find_places(pre_norm, ["model.decoder.layers.1"]).values()
    assert place.projection is pre_norm.model.decoder.layers[1].fc2
    (place,) = find_places(post_norm, ["model.decoder.layers.1"]).values()
    assert place.projection is post_norm.model.decoder.layers[1].final_layer_norm


@pytest.mark.parametrize(("config", "head"), [(BertConfig, True), (BertConfig, False), (DebertaConfig, False)])
def test_encoders(config, head):
    """The stack itself takes no token ids, and the model around it does."""
    torch.manual_seed(0)
    sizes = dict(IDS, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48)
    model = (AutoModelForSequenceClassification if head else AutoModel).from_config(config(**sizes)).eval()
    path = f"{model.base_model_prefix}.encoder.layer" if head else "encoder.layer"
    (place,) = find_places(model, [f"{path}.1"]).values()
    assert place.projection is model.get_submodule(f"{path}.1").output.LayerNorm


@pytest.mark.parametrize(
    "change",
    [
        lambda states: states * 0.999,
        lambda states: nn.functional.layer_norm(states, states.shape[-1:]),
        lambda states: states + 0.01 * torch.tanh(states),
        lambda states: torch.cat([states[:, :1] * 0.5, states[:, 1:]], dim=1),
    ],
    ids=["scaled", "normed", "gated", "one position"],
)
def test_an_architecture_that_is_not_what_it_seems(change):
    model, path = build("gpt2")
    layer = model.get_submodule(f"{path}.1")
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))
    with pytest.raises(ModelError, match="no norm or gate after it"):
        find_places(model, [f"{path}.1"])
    find_places(model, [f"{path}.0"])


def test_a_projection_that_two_layers_share():
    model, path = build("phi")
    layers = model.get_submodule(path)
    layers[2].mlp.fc2 = layers[0].mlp.fc2
    for targets in ([f"{path}.0"], [f"{path}.0", f"{path}.2"]):
        places = find_places(model, targets)
        # Phi's blocks are parallel, so the projection of the attention is as good.
        assert [places[name].projection for name in targets] == [
            model.get_submodule(f"{name}.self_attn.dense") for name in targets
        ]


def test_the_modes_of_modules_and_dropout():
    model, path = build("gpt2")
    model.train()
    model.get_submodule(f"{path}.0.attn").eval()
    before = snapshot(model)
    find_places(model, [f"{path}.1"])
    assert same(snapshot(model), before)


def test_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        model, path = build("llama")
        (place,) = find_places(model.to(dtype), [f"{path}.1"]).values()
        assert place.dtype == dtype
        with pytest.raises(ModelError):
            find_places(build("olmo2")[0].to(dtype), [f"{path}.1"])


def test_inside_a_lora_it_is_the_base_layer():
    model, path = build("llama")
    get_peft_model(model, LoraConfig(target_modules=["gate_proj", "down_proj"], r=8, lora_alpha=8))
    (place,) = find_places(model, [f"{path}.1"]).values()
    assert place.projection is model.model.layers[1].mlp.down_proj.base_layer
    complete(model, "mlp_bias")
    assert not model.model.layers[0].mlp.gate_proj.base_layer.bias.any()
    assert model.model.layers[0].mlp.gate_proj.lora_B["default"].bias is None


def test_offloaded_layers():
    model, path = build("gpt2")
    model.get_submodule(f"{path}.2").to("meta")
    with pytest.raises(ModelError, match="offloaded, expected all in memory"):
        find_places(model, [f"{path}.1"])


def test_offloaded_by_accelerate():
    model, path = build("gpt2")
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ModelError, match="offloaded, expected all in memory"):
        find_places(model, [f"{path}.1"])


def test_a_model_that_does_not_run_on_token_ids(monkeypatch):
    model, path = build("gpt2")

    def refuse(**_: object) -> None:
        raise KeyError("pixels")

    monkeypatch.setattr(model.transformer, "forward", refuse)
    with pytest.raises(ModelError, match="could not be run on token ids .*KeyError: 'pixels'"):
        find_places(model, [f"{path}.1"])


def test_biases_of_a_flag():
    model, _ = build("llama")
    sizes = {"gate_proj": 48, "up_proj": 48, "down_proj": 32}
    wanted = {f"model.layers.{i}.mlp.{name}": size for i in range(LAYERS) for name, size in sizes.items()}
    assert biases_switched_on_by(model, "mlp_bias") == wanted
    assert biases_switched_on_by(model, "tie_word_embeddings") == {}
    assert biases_switched_on_by(nn.Linear(2, 2), "mlp_bias") == {}

    class Custom(type(model)):
        def __init__(self, config):
            raise RuntimeError("needs a GPU")

    model.__class__ = Custom
    assert biases_switched_on_by(model, "mlp_bias") == {}


def test_completing_gives_zeros_and_leaves_the_old_config_alone():
    model, _ = build("llama")
    old, ids = model.config, torch.tensor([[5, 6, 7]])
    logits = model(ids).logits
    old_dict = copy.deepcopy(old.to_dict())
    complete(model.to(torch.float32), "mlp_bias")
    assert old.to_dict() == old_dict and model.config.mlp_bias is True
    assert model.model.config is model.config and model.model.layers[0].self_attn.config is model.config
    assert model.state_dict().keys() == type(model)(model.config).state_dict().keys()
    new = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    assert len(new) == 3 * LAYERS and not any(p.any() or p.requires_grad for p in new)
    assert torch.equal(model(ids).logits, logits)
