"""How the golden adapters were made. They are never made again: what is here must load for ever.

A change of the format gets a new version and new adapters beside these: `python tests/golden/make.py FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from steer_adapter import SteerConfig


COMMON = dict(vocab_size=48, bos_token_id=1, eos_token_id=2)
MODELS = {
    "llama": LlamaConfig(
        **COMMON, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, pad_token_id=0
    ),
    "gpt2": GPT2Config(**COMMON, n_embd=16, n_layer=4, n_head=2),
}
INPUT = torch.tensor([[5, 17, 33, 40, 8, 21]])


def fixed_model(architecture: str) -> PreTrainedModel:
    """A model whose weights come from arithmetic, not from a generator that may change."""
    model = AutoModelForCausalLM.from_config(MODELS[architecture]).eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + index)
            wave = wave.reshape(parameter.shape)
            is_norm = "norm" in name or "ln_" in name
            parameter.copy_(1 + 0.1 * wave if is_norm else 0.3 * wave)
    return model


def fixed_vector(layer: int) -> torch.Tensor:
    return torch.cos(torch.arange(16, dtype=torch.float64) * 0.9 + layer).float()


def save(folder: Path, architecture: str, name: str = "default", **config: object) -> None:
    model = get_peft_model(fixed_model(architecture), SteerConfig(task_type="CAUSAL_LM", **config), adapter_name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".steering." in key:
                parameter.copy_(fixed_vector(int(key.split(".steering")[0].rpartition(".")[2])))
    model.save_pretrained(folder)


def main(root: Path) -> None:
    provenance = {
        "method": "bipo", "seed": 42, "behavior": "a cheerful tone", "license": "apache-2.0", "chat": True,
        "data": {"source": "pairs.jsonl", "pairs": 2, "sha256": "0" * 64},
        "hyperparameters": {"beta": 0.1, "steps": 3}, "residual_norms": {"1": 2.5, "3": 4.0},
        "margins": {"-1": {"margin": -2.0, "right_way": 0.75}, "1": {"margin": 3.0, "right_way": 1.0}},
    }  # fmt: skip
    save(root / "llama", "llama", layers_to_transform=[1, -1], multiplier=0.5, provenance=provenance)
    save(root / "gpt2", "gpt2", layers_to_transform=2)
    save(root / "targets", "llama", target_modules=["layers.0", "layers.2"])
    save(root / "bfloat16", "llama", layers_to_transform=[1])
    weights = root / "bfloat16" / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    save(root / "library", "llama", name="calm", layers_to_transform=[0])
    save(root / "library", "llama", name="blunt", layers_to_transform=[2, 3], multiplier=-1.5)
    # The least that a reader may meet: the required keys alone.
    minimal = root / "gpt2" / "adapter_config.json"
    required = ("peft_type", "format_version", "operation", "layers_to_transform", "hidden_size", "num_hidden_layers")
    config = json.loads(minimal.read_text())
    minimal.write_text(json.dumps({key: config[key] for key in required}, indent=2))
    for path in sorted(root.rglob("adapter_config.json")):
        (path.parent / "README.md").unlink(missing_ok=True)
        architecture = "gpt2" if path.parent.name == "gpt2" else "llama"
        model = PeftModel.from_pretrained(fixed_model(architecture), path.parent)
        with torch.no_grad():
            logits = model(INPUT).logits[0, -1].tolist()
        (path.parent / "logits.json").write_text(json.dumps(logits))
    (root / "library" / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
