"""Attention within each pair of a shared layout, where the mask over the whole row would cost its square.

It takes part by transformers' own attention interface, in models whose layers pass keyword arguments on to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig


NAME = "steer_adapter_trees"
SMALL = 256  # tokens of a pair up to which its scores are kept for the backward pass: on a CPU that is faster
# What the interface passes that changes nothing here, or is taken into account.
HARMLESS = {"is_causal", "position_ids", "use_cache", "output_attentions", "cu_seq_lens_q", "cu_seq_lens_k"}


class TreeMasks(list[torch.Tensor]):
    """Masks of pairs, `[n, n]` each, that know whether any layer has used them."""

    used = False


class NotServed(Exception):
    """A layer asks for something that this attention does not do."""


def within_trees(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: Sequence[torch.Tensor], scaling: float
) -> torch.Tensor:
    """Attention of each pair by itself.

    Args:
        query, key, value: `[heads, N, D]`, pairs one after the other.
        masks: boolean `[n, n]` for each pair of n tokens; the last pair may be followed by nothing.
        scaling: factor of the scores.

    Returns:
        `[heads, N, D]`.
    """
    sizes = [len(mask) for mask in masks]
    parts = zip(query.split(sizes, 1), key.split(sizes, 1), value.split(sizes, 1), masks, strict=True)
    return torch.cat([_attention(q, k, v, mask, scaling) for q, k, v, mask in parts], dim=1)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    if len(mask) > SMALL:
        inputs = (tensor[None] for tensor in (query, key, value))
        return nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scaling)[0]
    hidden = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    scores = torch.baddbmm(hidden.expand(len(query), -1, -1), query, key.transpose(1, 2), alpha=scaling)
    exact = torch.promote_types(scores.dtype, torch.float32)
    return torch.bmm(scores.softmax(dim=-1, dtype=exact).to(value.dtype), value)


def tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_masks: TreeMasks | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """For transformers' attention interface: `[1, heads, N, D]` in, `[1, N, heads, D]` out.

    Raises:
        NotServed: the layer has more to it than scaled scores and a mask.
    """
    unknown = {name for name, given in kwargs.items() if given is not None and given is not False} - HARMLESS
    windowed = kwargs.get("sliding_window") is not None
    if tree_masks is None or dropout or len(query) != 1 or (unknown - ({"sliding_window"} if windowed else set())):
        raise NotServed(f"{type(module).__name__}: {sorted(unknown)}")
    tree_masks.used = True
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor[0].repeat_interleave(groups, dim=0) if groups > 1 else tensor[0] for tensor in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return within_trees(query[0], key, value, tree_masks, scaling).transpose(0, 1)[None].contiguous(), None


@contextmanager
def attending_within_trees(config: PretrainedConfig) -> Iterator[None]:
    """Let the layers of a model with this config use it, inside."""
    AttentionInterface.register(NAME, tree_attention)
    own = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
