"""A faster language model head for DPOTrainer, where the vocabulary projection is frozen.

DPOTrainer asks the model for log-probabilities and a few statistics of the completion tokens. Its own head is made to
train the projection too, and takes more than half of a step when a single vector trains. This one gives the same
numbers from the model's own logits, so that soft-capping and scaling stay the architecture's business.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from steer_adapter.log_probs import columns_from, first_prediction, takes_logits_to_keep, token_log_probs


def install(model: PreTrainedModel, outputs: tuple[str, ...]) -> None:
    """Put the head in the place of TRL's, on a model that TRL has patched; leave models alone that it can't serve.

    Those include models that accelerate has spread over devices, whose forward is not that of their class.
    """
    if not takes_logits_to_keep(model) or set(outputs) - set(_STATISTICS) or hasattr(model, "_hf_hook"):
        return
    forward = type(model).forward

    @functools.wraps(forward)
    def run(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None:
            labels_argument = {} if labels is None else {"labels": labels}
            return forward(self, *args, **labels_argument, **kwargs)
        targets = labels[:, 1:]
        first = first_prediction(targets != -100)
        result = forward(self, *args, logits_to_keep=columns_from(first, labels), **kwargs)
        fields = completion_fields(result.logits[:, :-1], targets, first)
        return FusedCausalLMOutput(loss=None, aux_loss=getattr(result, "aux_loss", None), **fields)

    model.forward = types.MethodType(run, model)  # a method, so that a copy of the model runs itself


def completion_fields(logits: torch.Tensor, targets: torch.Tensor, first: int) -> dict[str, torch.Tensor]:
    """Log-probability, entropy, mean logit and correctness of each predicted token, 0 elsewhere.

    Args:
        logits: `[B, T − first, V]`, those that predict `targets[:, first:]`.
        targets: `[B, T]`, −100 where nothing is predicted.
        first: columns of `targets` that have no logits.

    Returns:
        by name, `[B, T]` each: float32, and boolean for `is_top1`. Gradients flow through `log_probs` alone.
    """
    mask = targets != -100
    picked, wanted = logits[mask[:, first:]].float(), targets[mask]
    values = {"log_probs": token_log_probs(picked, wanted)}
    with torch.no_grad():
        log_normalizer = picked.logsumexp(dim=-1)
        probabilities = torch.exp(picked - log_normalizer[:, None])
        values["entropy"] = log_normalizer - (probabilities * picked).sum(dim=-1)
        values["mean_logits"] = picked.mean(dim=-1)
        values["is_top1"] = picked.argmax(dim=-1) == wanted
    return {name: _scatter(value, mask) for name, value in values.items()}


def _scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


_STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")
