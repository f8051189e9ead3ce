"""Tiny random models made from configs, and forwards steered by hand. Nothing is downloaded."""

from __future__ import annotations

import copy
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)


# Workers of `pytest -n` share the cores, with the commands that they start; more threads than cores make torch several
# times slower.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)

VOCAB, HIDDEN, LAYERS = 96, 32, 4
COMMON = dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4)
GQA = dict(
    COMMON, intermediate_size=48, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2
)

# Config, and where the test itself finds the decoder layers (it must not ask the package).
ARCHITECTURES = {
    "llama": (LlamaConfig(**GQA), "model.layers"),
    "gemma3": (Gemma3TextConfig(**GQA, sliding_window=4), "model.layers"),
    "qwen3": (Qwen3Config(**GQA), "model.layers"),
    "gpt2": (
        GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, bos_token_id=1, eos_token_id=2),
        "transformer.h",
    ),
    "gpt_neox": (GPTNeoXConfig(**COMMON, intermediate_size=48, bos_token_id=1, eos_token_id=2), "gpt_neox.layers"),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def make_model(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[architecture][0])).eval()
    # The default initialization gives states so small that a model of four layers hardly depends on its input.
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system", ":", ".", "?"]
    vocab = {word: index for index, word in enumerate(words + [f"w{i}" for i in range(VOCAB - len(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a saved tiny model with its tokenizer."""
    made: dict[str, Path] = {}

    def folder(architecture: str = "llama") -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            make_model(architecture).save_pretrained(made[architecture])
            make_tokenizer().save_pretrained(made[architecture])
        return made[architecture]

    return folder


@pytest.fixture
def load(base_dir: Callable[[str], Path]) -> Callable[..., PreTrainedModel]:
    """A fresh copy of a saved tiny model."""

    def fresh(architecture: str = "llama", **kwargs: object) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(base_dir(architecture), **kwargs).eval()

    return fresh


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.tensor([[5, 17, 33, 64, 8, 91, 20, 11], [7, 7, 40, 3, 29, 55, 71, 2]])


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, by the test's own table."""
    for _, path in ARCHITECTURES.values():
        try:
            return attrgetter(path)(model)
        except AttributeError:
            continue
    raise AssertionError(type(model))


@contextmanager
def steered_by_hand(model: PreTrainedModel, deltas: dict[int, torch.Tensor]) -> Iterator[None]:
    """Replace the forward of decoder layers by one that adds `deltas[layer]` to the hidden states it returns."""
    layers = layers_of(model)

    def steered(forward: Callable, delta: torch.Tensor) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            output = forward(*args, **kwargs)
            return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

        return run

    for index, delta in deltas.items():
        layers[index].forward = steered(layers[index].forward, delta)
    try:
        yield
    finally:
        for index in deltas:
            del layers[index].forward


def hand_logits(model: PreTrainedModel, input_ids: torch.Tensor, deltas: dict[int, torch.Tensor]) -> torch.Tensor:
    with steered_by_hand(model, deltas), torch.no_grad():
        return model(input_ids).logits


def random_vectors(layers: list[int], size: int = HIDDEN, seed: int = 1) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(size, generator=generator) for layer in layers}


def set_vectors(model: nn.Module, vectors: dict[int, torch.Tensor], adapter: str = "default") -> None:
    """Write vectors into a steered model, by layer index."""
    parameters = dict(model.named_parameters())
    for layer, vector in vectors.items():
        (name,) = [n for n in parameters if n.endswith(f".{layer}.steering.steer_vector.{adapter}")]
        with torch.no_grad():
            parameters[name].copy_(vector)
