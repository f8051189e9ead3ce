"""Architectures with and without a place for a vector in a bias, and whether a model is as it was."""

from __future__ import annotations

import torch
import transformers
from test_architectures import BASE, DECODERS, GQA, HEADS, make
from torch import nn
from transformers import AutoModelForCausalLM


MORE = {
    "gpt_neox sequential": ("GPTNeoXConfig", dict(BASE, use_parallel_residual=False), "gpt_neox.layers"),
    "falcon sequential": ("FalconConfig", dict(DECODERS["falcon"][1], parallel_attn=False), "transformer.h"),
    "falcon with bias": ("FalconConfig", dict(DECODERS["falcon"][1], bias=True), "transformer.h"),
    "granite scaled": ("GraniteConfig", dict(GQA, residual_multiplier=0.22), "model.layers"),
    "nemotron": ("NemotronConfig", GQA, "model.layers"),
    "opt without bias": ("OPTConfig", dict(DECODERS["opt"][1], enable_bias=False), "model.decoder.layers"),
    "opt post-norm": ("OPTConfig", dict(DECODERS["opt"][1], do_layer_norm_before=False), "model.decoder.layers"),
    "seed_oss": ("SeedOssConfig", HEADS, "model.layers"),
    "starcoder2 without bias": ("Starcoder2Config", dict(GQA, use_bias=False), "model.layers"),
}
# The place as read in the source of each architecture, and what switches its bias on.
PLACES = {
    "bloom": ("mlp.dense_4h_to_h", None),
    "cohere": ("self_attn.o_proj", "attention_bias"),
    "falcon": ("mlp.dense_4h_to_h", "bias"),
    "falcon sequential": ("mlp.dense_4h_to_h", "bias"),
    "falcon with bias": ("mlp.dense_4h_to_h", None),
    "gpt2": ("mlp.c_proj", None),
    "gpt_neo": ("mlp.c_proj", None),
    "gpt_neox": ("mlp.dense_4h_to_h", None),
    "gpt_neox sequential": ("mlp.dense_4h_to_h", None),
    "gptj": ("mlp.fc_out", None),
    "granite": ("mlp.down_proj", "mlp_bias"),
    "granite scaled": ("mlp.down_proj", "mlp_bias"),
    "llama": ("mlp.down_proj", "mlp_bias"),
    "mamba": ("mixer.out_proj", "use_bias"),
    "modernbert_decoder": ("mlp.Wo", "mlp_bias"),
    "nemotron": ("mlp.down_proj", "mlp_bias"),
    "opt": ("fc2", None),
    "opt post-norm": ("final_layer_norm", None),
    "opt without bias": ("fc2", "enable_bias"),
    "phi": ("mlp.fc2", None),
    "seed_oss": ("mlp.down_proj", "mlp_bias"),
    "starcoder2 without bias": ("mlp.c_proj", "use_bias"),
}
NONE = sorted((DECODERS | MORE).keys() - PLACES.keys())


def build(name: str) -> tuple[nn.Module, str]:
    if name in DECODERS:
        return make(name)
    config_class, arguments, path = MORE[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments)).eval(), path


def snapshot(model: nn.Module) -> tuple:
    """All that a search might leave behind: tensors, hooks, modes, the config."""
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(name, len(m._forward_hooks), m.training, list(m._parameters)) for name, m in model.named_modules()],
        {id(p): p.requires_grad for p in model.parameters()},
        model.config.to_dict() if hasattr(model, "config") else None,
    )


def same(first: tuple, second: tuple) -> bool:
    equal = first[0].keys() == second[0].keys() and all(
        torch.equal(first[0][k].nan_to_num(), second[0][k].nan_to_num()) for k in first[0]
    )
    return equal and first[1:] == second[1:]
