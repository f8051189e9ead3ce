"""How the golden adapters were made. They are never made again: what is here must load for ever.

A change of the format gets a new version and new adapters beside these. `python tests/golden/make.py FOLDER` makes
those that are missing and leaves the others alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
)

from steer_adapter import SteerConfig, steering


COMMON = dict(vocab_size=48, bos_token_id=1, eos_token_id=2)
MODELS = {
    "llama": LlamaConfig(
        **COMMON, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, pad_token_id=0
    ),
    "gpt2": GPT2Config(**COMMON, n_embd=16, n_layer=4, n_head=2),
    "t5": T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=4, num_decoder_layers=3, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0,
    ),
}  # fmt: skip
INPUT = torch.tensor([[5, 17, 33, 40, 8, 21]])
# For an encoder and a decoder, and where the prompt ends for vectors that steer some of the tokens.
DECODER_INPUT = torch.tensor([[0, 9, 30]])
PROMPT_LENGTH = 4


def fixed_model(architecture: str) -> PreTrainedModel:
    """A model whose weights come from arithmetic, not from a generator that may change."""
    config = MODELS[architecture]
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + index)
            wave = wave.reshape(parameter.shape)
            is_norm = "norm" in name or "ln_" in name
            parameter.copy_(1 + 0.1 * wave if is_norm else 0.3 * wave)
    return model


def fixed_vector(layer: int) -> torch.Tensor:
    return torch.cos(torch.arange(16, dtype=torch.float64) * 0.9 + layer).float()


def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """Of the last token, `[vocabulary]`."""
    inputs = {"input_ids": INPUT}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = DECODER_INPUT
    with torch.no_grad():
        return model(**inputs).logits[0, -1]


def save(folder: Path, architecture: str, name: str = "default", **config: object) -> None:
    if (folder / ("" if name == "default" else name)).exists():
        return
    task = "SEQ_2_SEQ_LM" if MODELS[architecture].is_encoder_decoder else "CAUSAL_LM"
    model = get_peft_model(fixed_model(architecture), SteerConfig(task_type=task, **config), adapter_name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".steering." in key:
                parameter.copy_(fixed_vector(int(key.split(".steering")[0].rpartition(".")[2])))
    model.save_pretrained(folder)


def in_bfloat16(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})


def with_required_keys_alone(folder: Path) -> None:
    """The least that a reader may meet."""
    path = folder / "adapter_config.json"
    required = ("peft_type", "format_version", "operation", "layers_to_transform", "hidden_size", "num_hidden_layers")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: config[key] for key in required}, indent=2))


def main(root: Path) -> None:
    provenance = {
        "method": "bipo", "seed": 42, "behavior": "a cheerful tone", "license": "apache-2.0", "chat": True,
        "data": {"source": "pairs.jsonl", "pairs": 2, "sha256": "0" * 64},
        "hyperparameters": {"beta": 0.1, "steps": 3}, "residual_norms": {"1": 2.5, "3": 4.0},
        "margins": {"-1": {"margin": -2.0, "right_way": 0.75}, "1": {"margin": 3.0, "right_way": 1.0}},
    }  # fmt: skip
    present = set(root.rglob("adapter_config.json"))
    save(root / "llama", "llama", layers_to_transform=[1, -1], multiplier=0.5, provenance=provenance)
    save(root / "gpt2", "gpt2", layers_to_transform=2)
    save(root / "targets", "llama", target_modules=["layers.0", "layers.2"])
    save(root / "bfloat16", "llama", layers_to_transform=[1])
    save(root / "library", "llama", name="calm", layers_to_transform=[0])
    save(root / "library", "llama", name="blunt", layers_to_transform=[2, 3], multiplier=-1.5)
    save(root / "prompt", "llama", layers_to_transform=[1, 2], token_scope="prompt")
    save(root / "completion", "llama", layers_to_transform=[1, 2], token_scope="completion", multiplier=2.0)
    save(root / "encoder", "t5", layers_to_transform=[0, -1], stack="encoder")
    for path in sorted(set(root.rglob("adapter_config.json")) - present):
        finish(path.parent)
    (root / "library" / "README.md").unlink(missing_ok=True)


def finish(folder: Path) -> None:
    if folder.name == "bfloat16":
        in_bfloat16(folder)
    if folder.name == "gpt2":
        with_required_keys_alone(folder)
    (folder / "README.md").unlink(missing_ok=True)
    architecture = {"gpt2": "gpt2", "encoder": "t5"}.get(folder.name, "llama")
    model = PeftModel.from_pretrained(fixed_model(architecture), folder)
    with steering(model, prompt_lengths=[PROMPT_LENGTH]):
        (folder / "logits.json").write_text(json.dumps(logits(model).tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
