from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, HIDDEN, LAYERS, layers_of, make_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BloomConfig,
    MixtralConfig,
    T5Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from steer_adapter.decoder import find_decoder
from steer_adapter.errors import ModelError


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_decoder_only(architecture):
    model = make_model(architecture)
    decoder = find_decoder(model)
    assert [model.get_submodule(name) for name in decoder.names] == list(layers_of(model))
    assert (len(decoder), decoder.hidden_size) == (LAYERS, HIDDEN)
    assert decoder.model_type == model.config.model_type


def test_names_are_relative_to_what_was_searched():
    tuned = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    decoder = find_decoder(tuned)
    assert decoder.names[2] == "base_model.model.model.layers.2"
    assert tuned.get_submodule(decoder.names[2]) is tuned.base_model.model.model.layers[2]


def test_experts_are_not_decoder_layers():
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=8,
    )  # fmt: skip
    assert find_decoder(AutoModelForCausalLM.from_config(config)).names == ("model.layers.0", "model.layers.1")


@pytest.mark.parametrize(
    ("model_class", "config", "names"),
    [
        (
            AutoModelForSeq2SeqLM.from_config,
            T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=3, num_decoder_layers=2, num_heads=2),
            ("decoder.block.0", "decoder.block.1"),
        ),
        (
            AutoModelForSeq2SeqLM.from_config,
            BartConfig(
                vocab_size=64,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                max_position_embeddings=32,
            ),
            ("model.decoder.layers.0", "model.decoder.layers.1"),
        ),
        (
            WhisperForConditionalGeneration,
            WhisperConfig(
                vocab_size=64,
                d_model=16,
                encoder_layers=3,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            ),
            ("model.decoder.layers.0", "model.decoder.layers.1"),
        ),
    ],
    ids=["t5", "bart", "whisper"],
)
def test_of_two_stacks_the_text_decoder(model_class, config, names):
    assert find_decoder(model_class(config)).names == names


def test_layers_that_return_tuples():
    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    assert find_decoder(AutoModelForCausalLM.from_config(config)).names == ("transformer.h.0", "transformer.h.1")


def test_a_model_without_a_config():
    with pytest.raises(ModelError, match=r"no config.*target_modules=.*hidden_size="):
        find_decoder(nn.Sequential(nn.Linear(4, 4)))


def test_a_model_without_layers():
    model = nn.Linear(4, 4)
    model.config = make_model().config
    with pytest.raises(ModelError, match=r"No decoder layers were found in Linear.*target_modules"):
        find_decoder(model)
    assert torch.equal(model.weight, model.weight)
