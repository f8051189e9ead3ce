"""The language model head on completion tokens alone, where the vocabulary projection is frozen.

DPOTrainer asks the model for log-probabilities and a few statistics of the completion tokens. Its own head is made to
train the projection too, and takes more than half of a step when a single vector trains. This one gives the same
numbers from the model's own logits, so that soft-capping and scaling stay the architecture's business. Logits are
made a chunk at a time and the gradient of each token's log-probability along with them, so none are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel


Head = Callable[[torch.Tensor], torch.Tensor]
STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")
CHUNK = 512  # tokens whose logits are held at once
BLOCK_BYTES = 4 * 2**20  # of them, what is worked on at once: it stays in a CPU's cache


def completion_fields(
    head: Head, states: torch.Tensor, targets: torch.Tensor, in_chunks: bool = True
) -> dict[str, torch.Tensor]:
    """Log-probability, entropy, mean logit and correctness of each predicted token.

    Args:
        head: gives logits `[k, V]` for states `[k, H]`.
        states: `[K, H]`, the last hidden states of the tokens that predict.
        targets: `[K]`, the tokens predicted.
        in_chunks: whether the head may be called several times, for some of the states each.

    Returns:
        by name, `[K]` each: float32, and boolean for `is_top1`. Gradients flow through `log_probs` alone.
    """
    return dict(
        zip(STATISTICS, _Fields.apply(states, targets, head, CHUNK if in_chunks else len(targets)), strict=True)
    )


class _Fields(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, targets: torch.Tensor, head: Head, size: int
    ) -> tuple[torch.Tensor, ...]:
        wanted = ctx.needs_input_grad[0]
        parts = zip(states.detach().split(size), targets.split(size), strict=True)
        fields, gradients = zip(*(_chunk(head, *part, wanted) for part in parts), strict=True)
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        log_probs, *others = (torch.cat(parts) for parts in zip(*fields, strict=True))
        ctx.mark_non_differentiable(*others)
        return log_probs, *others

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (slope,) = ctx.saved_tensors
        return (gradients[0][:, None] * slope).to(slope.dtype), None, None, None


def _chunk(
    head: Head, states: torch.Tensor, targets: torch.Tensor, wanted: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """The statistics of some tokens, and d log p / d states `[k, H]` if wanted; their logits are gone then."""
    kept = [states]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.set_grad_enabled(wanted), saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = head(states.requires_grad_(wanted))
    slope = None
    if wanted:  # it takes the place of the logits, unless the head's own gradient is computed from them (a tanh's is)
        slope = torch.empty_like(logits) if _may_share_memory(logits, kept) else logits.detach()
    values = logits_fields(logits.detach(), targets, slope)
    return values, torch.autograd.grad(logits, states, slope)[0] if wanted else None


def _may_share_memory(tensor: torch.Tensor, others: Iterable[torch.Tensor]) -> bool:
    tensors = (tensor, *others)
    if any(type(each) not in (torch.Tensor, nn.Parameter) for each in tensors):
        return True  # of a sharded or quantized tensor nobody can say
    place, *places = (each.untyped_storage().data_ptr() for each in tensors)
    return place in places


def logits_fields(
    logits: torch.Tensor, targets: torch.Tensor, slope: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The statistics of logits `[K, V]`, `[K]` each. d log p(target) / d logits is written to `slope`, `[K, V]`, which
    may be the logits themselves."""
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[1])) if logits.device.type == "cpu" else len(logits)
    parts = []
    for start in range(0, len(logits), rows):
        block, target = logits[start : start + rows].float(), targets[start : start + rows, None]
        largest, best = block.max(dim=1, keepdim=True)
        probabilities = (block - largest).exp_()
        total = probabilities.sum(dim=1, keepdim=True)
        probabilities /= total
        log_normalizer = largest + total.log()
        values = (
            block.gather(1, target) - log_normalizer,
            log_normalizer - torch.linalg.vecdot(probabilities, block)[:, None],
            block.mean(dim=1, keepdim=True),
            best == target,
        )
        parts.append([value[:, 0] for value in values])
        if slope is not None:
            probabilities.neg_().scatter_add_(1, target, torch.ones_like(largest))
            slope[start : start + rows] = probabilities
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def run_backbone(model: PreTrainedModel, backbone: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Head]:
    """The last hidden states `[R, N, H]`, and the architecture's own head for any rows `[k, H]` of them."""
    output = backbone(**inputs, use_cache=False)

    def head(states: torch.Tensor) -> torch.Tensor:
        handed = type(output)(**{**output, "last_hidden_state": states[None]})
        with replaced_forward(backbone, lambda *args, **kwargs: handed):
            return type(model).forward(model, input_ids=_placeholder(model, len(states))).logits[0]

    return output.last_hidden_state, head


def find_backbone(model: PreTrainedModel) -> nn.Module | None:
    """The module whose output the model's own forward hands to its head; None if it calls none of the known ones."""

    def reached(*args: Any, **kwargs: Any) -> None:
        raise _Reached

    for backbone in (model.base_model, model.get_decoder()):
        if isinstance(backbone, nn.Module) and backbone is not model:
            with suppress(_Reached), replaced_forward(backbone, reached), torch.no_grad():
                type(model).forward(model, input_ids=_placeholder(model, 1))
                continue
            return backbone
    return None


class _Reached(Exception):
    """Raised in the place of a backbone's forward, to see that it is called."""


def _placeholder(model: PreTrainedModel, length: int) -> torch.Tensor:
    return torch.zeros(1, length, dtype=torch.long, device=model.device)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module's forward, replaced on the instance for a while."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
