"""Log-probabilities of completions, computed only where a completion token is predicted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from steer_adapter.tuner.layer import steer_layers
from steer_adapter.tuner.strength import steering


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the forward of the transformers model can skip the vocabulary projection of the first tokens."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


def first_prediction(mask: torch.Tensor) -> int:
    """The first column of a mask `[B, T]` in which any row is set."""
    return int(mask.any(dim=0).to(torch.uint8).argmax())


def columns_from(first: int, ids: torch.Tensor) -> torch.Tensor:
    """`logits_to_keep` for the columns of `ids` from `first`.

    Indices rather than a count: a slice is not contiguous, and its projection several times slower on a CPU.
    """
    return torch.arange(first, ids.shape[1], device=ids.device)


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of each target, in float32.

    Args:
        logits: `[N, V]`, any floating dtype.
        targets: `[N]`, token ids.

    Returns:
        `[N]`, float32.
    """
    return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def known_prompts(model: nn.Module, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Tell vectors that steer the prompt or the completion only where the prompts of a batch end.

    Args:
        model: carries vectors, or none.
        batch: `attention_mask` and `completion_mask`, each `[2B, T]`.
    """
    if not any(layer.is_scoped for layer in steer_layers(model)):
        return nullcontext()
    lengths = batch["attention_mask"].sum(dim=1) - batch["completion_mask"].sum(dim=1)
    return steering(model, prompt_lengths=lengths.clamp(min=1))


@torch.no_grad()
def completion_log_probs(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Sum of the log-probabilities of the completion tokens of each row, float32 on the CPU, `[2B]`.

    Args:
        model: a causal language model.
        batch: `input_ids`, `attention_mask` and `completion_mask`, each `[2B, T]`.
    """
    # Under CPU offload parameters are on the meta device between forwards.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    ids, mask = batch["input_ids"].to(device), batch["completion_mask"][:, 1:].to(device).bool()
    inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"].to(device)}
    first = first_prediction(mask)
    with known_prompts(model, batch):
        if takes_logits_to_keep(model):
            logits = model(**inputs, logits_to_keep=columns_from(first, ids)).logits
        else:
            logits = model(**inputs).logits[:, first:]
    mask, targets = mask[:, first:], ids[:, first + 1 :]
    log_probs = token_log_probs(logits[:, :-1][mask], targets[mask])
    rows = mask.nonzero()[:, 0]
    return torch.zeros(ids.shape[0], device=device).index_add(0, rows, log_probs).cpu()
