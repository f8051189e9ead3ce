"""Tiny random models of many families: the layers found, the state that leaves a steered layer, saving, generating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    PreTrainedConfig,
    T5Config,
    T5GemmaConfig,
    WhisperConfig,
)

from steer_adapter import SteerConfig, verify
from steer_adapter.decoder import find_decoder
from steer_adapter.errors import ModelError


VOCAB, HIDDEN, LAYERS, STEERED = 96, 32, 3, 1
IDS = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BASE = dict(IDS, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48)
GQA = dict(BASE, num_key_value_heads=2)
HEADS = dict(GQA, head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

# Config class, its arguments, and where the test itself finds the decoder layers.
DECODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", GQA, "model.layers"),
    "mistral": ("MistralConfig", dict(HEADS, sliding_window=4), "model.layers"),
    "mixtral": ("MixtralConfig", dict(GQA, num_local_experts=4), "model.layers"),
    "qwen2": ("Qwen2Config", GQA, "model.layers"),
    "qwen2_moe": ("Qwen2MoeConfig", dict(GQA, **EXPERTS, shared_expert_intermediate_size=16), "model.layers"),
    "qwen3": ("Qwen3Config", HEADS, "model.layers"),
    "qwen3_moe": ("Qwen3MoeConfig", dict(HEADS, **EXPERTS), "model.layers"),
    "gemma": ("GemmaConfig", HEADS, "model.layers"),
    "gemma2": ("Gemma2Config", dict(HEADS, sliding_window=4), "model.layers"),
    "gemma3_text": ("Gemma3TextConfig", dict(HEADS, sliding_window=4), "model.layers"),
    "phi": ("PhiConfig", BASE, "model.layers"),
    "phi3": ("Phi3Config", GQA, "model.layers"),
    "gpt2": ("GPT2Config", dict(IDS, n_embd=HIDDEN, n_layer=LAYERS, n_head=4), "transformer.h"),
    "gptj": ("GPTJConfig", dict(IDS, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, rotary_dim=4), "transformer.h"),
    "gpt_neo": (
        "GPTNeoConfig",
        dict(IDS, hidden_size=HIDDEN, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]),
        "transformer.h",
    ),
    "gpt_neox": ("GPTNeoXConfig", BASE, "gpt_neox.layers"),
    "opt": (
        "OPTConfig",
        dict(
            IDS, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, ffn_dim=48,
            word_embed_proj_dim=16,
        ),
        "model.decoder.layers",
    ),
    "bloom": ("BloomConfig", dict(IDS, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4), "transformer.h"),
    "falcon": (
        "FalconConfig",
        dict(IDS, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4),
        "transformer.h",
    ),
    "mpt": ("MptConfig", dict(IDS, d_model=HIDDEN, n_layers=LAYERS, n_heads=4), "transformer.blocks"),
    "stablelm": ("StableLmConfig", dict(BASE, num_key_value_heads=4), "model.layers"),
    "cohere": ("CohereConfig", GQA, "model.layers"),
    "olmo2": ("Olmo2Config", GQA, "model.layers"),
    "granite": ("GraniteConfig", GQA, "model.layers"),
    "deepseek_v3": (
        "DeepseekV3Config",
        dict(
            BASE, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=8,
        ),
        "model.layers",
    ),
    "mamba": ("MambaConfig", dict(IDS, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=4), "backbone.layers"),
    "jamba": (
        "JambaConfig",
        dict(
            GQA, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=0, num_experts=4,
            mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
        ),
        "model.layers",
    ),
    "modernbert_decoder": ("ModernBertDecoderConfig", dict(BASE, global_attn_every_n_layers=2), "model.layers"),
}  # fmt: skip


def make(name: str) -> tuple[nn.Module, str]:
    config_class, arguments, path = DECODERS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments)).eval()
    return model, path


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[5, 17, 33, 64, 8, 91, 20], [7, 7, 40, 3, 29, 55, 71]])}


def leaving(model: nn.Module, path: str, layer: int, **arguments: torch.Tensor) -> torch.Tensor:
    """The hidden states that leave a decoder layer, after every hook that was there before."""
    seen: list[torch.Tensor] = []

    def record(_: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(f"{path}.{layer}").register_forward_hook(record)
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        handle.remove()
    return seen[-1]


def steer(model: nn.Module, vector: torch.Tensor, stack: str | None = None) -> PeftModel:
    steered = get_peft_model(model, SteerConfig(layers_to_transform=STEERED, stack=stack, multiplier=-1.5))
    (parameter,) = [p for n, p in steered.named_parameters() if ".steering." in n]
    with torch.no_grad():
        parameter.copy_(vector)
    return steered


@pytest.fixture
def vector() -> torch.Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", list(DECODERS))
def test_decoder(name: str, vector: torch.Tensor, tmp_path) -> None:
    model, path = make(name)
    layers = model.get_submodule(path)
    decoder = find_decoder(model)
    assert [model.get_submodule(layer) for layer in decoder.names] == list(layers)
    assert (len(decoder), decoder.hidden_size) == (model.config.num_hidden_layers, HIDDEN)

    with torch.no_grad():
        states = model(**inputs(), output_hidden_states=True).hidden_states
    before = leaving(model, path, STEERED, **inputs())
    steered = steer(model, vector)
    assert (leaving(model, path, STEERED, **inputs()) - (before - 1.5 * vector)).abs().max() <= 1e-6
    with torch.no_grad():
        shown = steered(**inputs(), output_hidden_states=True).hidden_states
    (index,) = [i for i, state in enumerate(states) if torch.equal(state, before)]  # Mamba shows no embeddings
    assert (shown[index] - (states[index] - 1.5 * vector)).abs().max() <= 1e-5

    with torch.no_grad():
        logits = steered(**inputs()).logits
    steered.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(name)[0], tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs()).logits, logits)

    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    cached, uncached = (again.generate(**inputs(), **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


def encoder_decoder(config: PreTrainedConfig) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        auto = AutoModelForSpeechSeq2Seq if config.model_type == "whisper" else AutoModelForSeq2SeqLM
        return auto.from_config(config).eval()

    return build


BART = dict(
    IDS, d_model=HIDDEN, encoder_layers=2, decoder_layers=LAYERS, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, decoder_start_token_id=1,
    forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(
    vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=LAYERS, num_decoder_layers=LAYERS, num_heads=4,
    decoder_start_token_id=0,
)  # fmt: skip


WHISPER = dict(
    {key: value for key, value in BART.items() if key != "max_position_embeddings"}, num_mel_bins=8,
    max_source_positions=16, max_target_positions=32,
)  # fmt: skip
T5GEMMA = {key: value for key, value in HEADS.items() if key not in IDS}
SPEECH = {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize(
    ("config", "given", "path"),
    [
        (BartConfig(**BART), inputs(), "model.decoder.layers"),
        (T5Config(**T5), inputs(), "decoder.block"),
        (T5GemmaConfig(encoder=T5GEMMA, decoder=T5GEMMA, **IDS), inputs(), "model.decoder.layers"),
        (WhisperConfig(**WHISPER), SPEECH, "model.decoder.layers"),
    ],
    ids=["bart", "t5", "t5gemma", "whisper"],
)
def test_encoder_decoder(
    config: PreTrainedConfig, given: dict[str, torch.Tensor], path: str, vector: torch.Tensor, tmp_path
) -> None:
    build = encoder_decoder(config)
    model = build()
    arguments = {**given, "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 8, 9]])}
    decoder = find_decoder(model)
    assert (decoder.names, decoder.hidden_size) == (tuple(f"{path}.{i}" for i in range(LAYERS)), HIDDEN)
    before = leaving(model, path, STEERED, **arguments)
    steered = steer(model, vector)
    assert torch.equal(leaving(model, path, STEERED, **arguments), before - 1.5 * vector)
    assert verify(steered, None if given is not SPEECH else arguments)
    steered.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**arguments).logits, steered(**arguments).logits)
    options = dict(max_new_tokens=5, do_sample=False)
    cached, uncached = (again.generate(**given, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize(
    ("config", "path"),
    [(BartConfig(**BART), "model.encoder.layers"), (T5Config(**dict(T5, num_layers=2)), "encoder.block")],
    ids=["bart", "t5"],
)
def test_the_encoder_by_choice(config: PreTrainedConfig, path: str, vector: torch.Tensor, tmp_path) -> None:
    build = encoder_decoder(config)
    model = build()
    arguments = {**inputs(), "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 8, 9]])}
    before = leaving(model, path, 1, **arguments)
    steered = steer(model, vector, stack="encoder")
    assert torch.equal(leaving(model, path, 1, **arguments), before - 1.5 * vector)
    steered.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    saved = again.peft_config["default"]
    assert (saved.stack, saved.num_hidden_layers, saved.layers_to_transform) == ("encoder", 2, [1])
    with torch.no_grad():
        assert torch.equal(again(**arguments).logits, steered(**arguments).logits)
    with pytest.raises(ModelError, match="num_hidden_layers=2.*num_hidden_layers=3"):
        PeftModel.from_pretrained(encoder_decoder(T5Config(**T5))(), tmp_path)
