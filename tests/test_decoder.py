from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import ARCHITECTURES, HIDDEN, LAYERS, layers_of, make_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MixtralConfig,
    ModernBertDecoderConfig,
    T5Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLMConfig,
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


def blocks(count: int, width: int = 4) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(count))


def test_a_model_without_a_config():
    with pytest.raises(ModelError, match=r"No decoder layers.*target_modules=.*hidden_size="):
        find_decoder(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ModelError, match=r"no config.*target_modules=.*hidden_size="):
        find_decoder(nn.Sequential(blocks(2)))


def test_a_model_without_layers():
    model = nn.Linear(4, 4)
    model.config = make_model().config
    with pytest.raises(ModelError, match=r"No decoder layers were found in Linear.*target_modules"):
        find_decoder(model)


def bert(**options: object) -> BertConfig:
    return BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **options
    )


def test_get_decoder_that_leads_nowhere():
    config = ModernBertDecoderConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model.get_decoder(), nn.Linear)  # the head
    assert find_decoder(model).names == ("model.layers.0", "model.layers.1")


def test_configs_within_the_config():
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(bert(), bert()))
    decoder = find_decoder(model)
    assert decoder.names == ("decoder.bert.encoder.layer.0", "decoder.bert.encoder.layer.1")
    assert (decoder.hidden_size, decoder.model_type) == (16, "bert")
    assert find_decoder(model, "encoder").names == ("encoder.encoder.layer.0", "encoder.encoder.layer.1")


def test_the_text_goes_before_a_larger_tower():
    model = nn.Module()
    model.config = SimpleNamespace(model_type="text", hidden_size=4, num_hidden_layers=2)
    model.tower = nn.Module()
    model.tower.config = SimpleNamespace(model_type="vision", hidden_size=9, num_hidden_layers=5)
    model.tower.layers = blocks(5, 9)
    model.layers = blocks(2)
    assert find_decoder(model).names == ("layers.0", "layers.1")
    decoder = find_decoder(model, "tower")
    assert (len(decoder), decoder.hidden_size, decoder.model_type) == (5, 9, "vision")


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ("model.nothing", r"`stack`: received 'model.nothing', which names no module in LlamaForCausalLM"),
        ("mlp", r"names \['model.layers.0.mlp', 'model.layers.1.mlp'"),
        ("model.norm", r"No decoder layers were found in LlamaForCausalLM below 'model.norm'"),
    ],
)
def test_a_stack_that_is_none(stack, message):
    with pytest.raises(ModelError, match=message):
        find_decoder(make_model(), stack)


def test_a_stack_of_a_wrapped_model():
    tuned = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    assert find_decoder(tuned, "model.layers").names == find_decoder(tuned).names


def test_layers_in_pieces_are_refused():
    config = XLMConfig(vocab_size=64, emb_dim=16, n_layers=2, n_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"'transformer.attentions': 2, 'transformer.ffns': 2.*several fit"):
        find_decoder(model)
    assert len(find_decoder(model, "transformer.ffns")) == 2


def test_layers_that_run_several_times_are_refused():
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"albert_layer_groups': 1\}.*none is as long as its config says"):
        find_decoder(AlbertForMaskedLM(config))


def test_a_layer_used_twice_is_refused():
    model = make_model()
    model.model.layers[3] = model.model.layers[1]
    with pytest.raises(ModelError, match=r"the 4 layers of 'model.layers' are only 3 modules"):
        find_decoder(model)


def test_several_residual_streams_are_refused():
    model = make_model()
    model.model.config = SimpleNamespace(**model.config.to_dict(), hc_mult=4)
    with pytest.raises(ModelError, match=r"several residual streams.*\{'hc_mult': 4\}"):
        find_decoder(model)
