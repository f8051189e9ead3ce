"""Which token of its row each position of a forward is, for vectors that steer the prompt or the completion only."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from steer_adapter.errors import ModelError


SCOPES = ("all", "prompt", "completion")


def scope_mask(scope: str, ranks: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
    """Where a vector of this scope steers.

    `prompt` is every prompt token but the last, `completion` starts at the last prompt token, because that one
    predicts the first completion token.

    Args:
        scope: `"prompt"` or `"completion"`.
        ranks: `[B, T]` or `[1, T]` int64, from `token_ranks`.
        prompt_lengths: `[B]` int64.

    Returns:
        `[B, T]` float32, 1 where it steers and 0 elsewhere.
    """
    completion = ranks >= prompt_lengths[:, None].to(ranks.device) - 1
    return (completion if scope == "completion" else ~completion).float()


def token_ranks(arguments: dict[str, Any], tokens: int, device: torch.device) -> torch.Tensor:
    """The number of each token within its row, padding and cached tokens considered: `[B, T]` or `[1, T]` int64.

    Args:
        arguments: what the decoder's forward was called with, by name.
        tokens: T, the tokens of this forward; earlier ones are in the cache.
        device: of the result, unless the arguments decide it.

    Raises:
        ModelError: the arguments don't tell.
    """
    mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= tokens:
        ranks, cache = mask.long().cumsum(dim=1) - 1, arguments.get("past_key_values")
        if cache is None or not getattr(cache, "is_compileable", False):
            return ranks[:, mask.shape[1] - tokens :]
        # The mask may be for all places of a static cache, filled or not (BLOOM).
        places = torch.arange(tokens, device=mask.device) + cache.get_seq_length()
        return ranks[:, places.clamp(max=mask.shape[1] - 1)]
    if isinstance(position_ids, torch.Tensor) and position_ids.ndim == 2:
        return position_ids
    if mask is None:
        cache = arguments.get("past_key_values")
        return torch.arange(tokens, device=device)[None] + (0 if cache is None else cache.get_seq_length())
    raise ModelError(
        "token_scope: the model was called with an attention mask that is not [batch, tokens] and without "
        "position_ids, so prompt and completion can't be told apart. Pass one of them, or use vectors with "
        "token_scope='all'."
    )


def is_packed(arguments: dict[str, Any]) -> bool:
    """Whether the arguments of a decoder layer show rows that hold several sequences."""
    if any(arguments.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens", "seq_idx")):
        return True
    ids = arguments.get("position_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        return False
    # A second sequence begins at 0 again; the 0s of padding come before the first token.
    begins_again = (ids[:, 1:] == 0) & (ids[:, :-1] > 0) & (ids[:, :1] == 0)
    return bool(begins_again.any())


# By thread: one model may serve several at once. Not a context variable, since torch.compile can't trace those.
_current = threading.local()


class NoteRanks:
    """Forward pre-hook of the module that holds the decoder layers: takes down the ranks for them."""

    def __init__(self, decoder: nn.Module) -> None:
        self.names = tuple(inspect.signature(decoder.forward).parameters)

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        inputs = arguments.get("input_ids")
        inputs = arguments.get("inputs_embeds") if inputs is None else inputs
        _current.ranks = None if inputs is None else token_ranks(arguments, inputs.shape[1], inputs.device)


def note_ranks(decoder: nn.Module) -> None:
    """Make a decoder take down the ranks of its tokens in each forward; once is enough."""
    if not any(isinstance(hook, NoteRanks) for hook in decoder._forward_pre_hooks.values()):
        decoder.register_forward_pre_hook(NoteRanks(decoder), with_kwargs=True)


def forget_ranks(decoder: nn.Module) -> None:
    """Take that off again."""
    hooks = decoder._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, NoteRanks)]:
        del hooks[key]
        decoder._forward_pre_hooks_with_kwargs.pop(key, None)


def current_ranks(tokens: int) -> torch.Tensor | None:
    """The ranks of the forward that this thread is in, if its decoder took them down for so many tokens."""
    ranks = getattr(_current, "ranks", None)
    return ranks if ranks is not None and ranks.shape[1] == tokens else None
