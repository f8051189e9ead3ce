from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import HIDDEN, make_model
from torch import nn
from transformers import BartConfig, LlamaConfig, LlavaConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from steer_adapter.shapes import lengths, shape_at, streams, text_config, widths, with_parts


def test_the_innermost_config():
    vision = dict(depth=2, embed_dim=16, hidden_size=48, num_heads=2, patch_size=4, mlp_ratio=2)
    text = dict(
        vocab_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=56, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    config, width = shape_at(model, "model.language_model.layers.1")
    assert (config.model_type, width, lengths(config)) == ("qwen2_vl_text", 48, {3})
    # The `hidden_size` of this vision tower is what its merger gives out; its blocks are 16 wide.
    config, width = shape_at(model, "model.visual.blocks.0")
    assert (config.model_type, width, lengths(config)) == ("qwen2_vl_vision", 16, {2})


def test_a_config_within_another():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(12, 12)])
    model.config = SimpleNamespace(text_config=SimpleNamespace(model_type="inner", hidden_size=12))
    assert shape_at(model, "layers.0") == (model.config.text_config, 12)


def test_a_width_that_no_weight_has():
    model = make_model()
    model.config = model.model.config = SimpleNamespace(hidden_size=7)
    assert shape_at(model, "model.layers.1") == (None, None)


def test_a_block_without_weights():
    model = make_model()
    model.model.layers[1].extra = nn.Identity()
    assert shape_at(model, "model.layers.1.extra") == (model.model.config, HIDDEN)


def test_packed_weights():
    model = make_model()
    layer = model.model.layers[1]
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.zeros(module.weight.numel() // 2, 1))
    layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
    assert shape_at(model, "model.layers.1")[1] == HIDDEN


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(num_hidden_layers=3), {3}),
        (BartConfig(encoder_layers=2, decoder_layers=5), {2, 5}),
        (SimpleNamespace(num_layers=None), set()),
        (None, set()),
    ],
)
def test_lengths(config, expected):
    assert lengths(config) == expected


def test_streams():
    assert streams(SimpleNamespace(hc_mult=4)) == {"hc_mult": 4}
    assert streams(LlamaConfig()) == {}


def test_the_config_of_the_text_decoder():
    flat = LlamaConfig(hidden_size=64)
    assert text_config(nn.Linear(1, 1)) is None
    holder = nn.Module()
    holder.config = flat
    assert text_config(holder) is flat
    holder.config = LlavaConfig(text_config=flat)
    assert text_config(holder) is holder.config.text_config
    holder.config = BartConfig()
    assert text_config(holder) is holder.config


def test_what_each_part_of_a_config_says():
    text = LlamaConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = LlavaConfig(text_config=text)
    assert config in list(with_parts(config)) and [48] in [widths(part) for part in with_parts(config)]
    assert {3} in [lengths(part) for part in with_parts(config)]
    assert list(with_parts(None)) == []
