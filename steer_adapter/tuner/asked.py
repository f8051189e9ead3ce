"""What one layer is asked to do with one batch: its live settings, and the request of the caller."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from steer_adapter.errors import ModelError

from .positions import current_ranks, scope_mask
from .request import Request, request_for


if TYPE_CHECKING:
    from .layer import SteerLayer


@dataclass(frozen=True)
class Asked:
    """What one layer is asked to do with one batch.

    Attributes:
        multipliers: by adapter, float32, broadcastable against `[B, T, H]`.
        picked: m·v from a library, `[B, 1, H]` or `[B, T, H]` float32.
    """

    multipliers: dict[str, torch.Tensor]
    picked: torch.Tensor | None = None

    def copied(self) -> Asked:
        """A copy that keeps its values when a multiplier is set afterwards."""
        return replace(self, multipliers={name: value.clone() for name, value in self.multipliers.items()})

    def equals(self, other: Asked) -> bool:
        ours, theirs = self.multipliers, other.multipliers
        if ours.keys() != theirs.keys() or (self.picked is None) != (other.picked is None):
            return False
        pairs = [(ours[name], theirs[name]) for name in ours]
        if self.picked is not None:
            pairs.append((self.picked, other.picked))
        return all(first.shape == second.shape and torch.equal(first, second) for first, second in pairs)


def ask(layer: SteerLayer, hidden_states: torch.Tensor) -> Asked:
    """What a layer is asked to do with hidden states `[B, T, H]`."""
    request, (rows, tokens, _) = request_for(layer), hidden_states.shape
    if layer.disable_adapters:
        return Asked({})

    def in_scope(strength: torch.Tensor, scope: str) -> torch.Tensor:
        by_row = strength[:, None, None] if strength.ndim else strength
        if scope == "all":
            return by_row
        lengths = prompt_lengths(request, rows)
        return by_row * token_mask(scope, tokens, lengths).to(strength.device)

    strengths_ = strengths(layer, request, rows)
    multipliers = {name: in_scope(strength, layer.scopes[name]) for name, strength in strengths_.items()}
    if layer.library is None or request is None or request.names is None:
        return Asked(multipliers)
    return Asked(multipliers, layer.library.pick(request, rows, hidden_states.device, in_scope))


def strengths(layer: SteerLayer, request: Request | None, rows: int) -> dict[str, torch.Tensor]:
    """The multipliers of the vectors that steer, each a scalar or `[rows]`."""
    if request is None:
        return {name: layer.multipliers[name] for name in layer.active_adapters if name in layer.steer_vector}
    return {name: request.strength(name, layer.multipliers[name], rows) for name in _wanted(layer, request)}


def _wanted(layer: SteerLayer, request: Request) -> list[str]:
    """The vectors that rows name; without names the active ones, and those that a value is given for."""
    named = request.names
    if named is None:
        named = (*layer.active_adapters, *(request.multiplier if isinstance(request.multiplier, dict) else ()))
    return [name for name in dict.fromkeys(named) if name in layer.steer_vector]


def prompt_lengths(request: Request | None, rows: int) -> torch.Tensor:
    """The prompt lengths of the rows, `[rows]` int64.

    Raises:
        ModelError: nobody gave them.
    """
    if request is None or request.prompt_lengths is None:
        raise ModelError(
            "token_scope: the model was called without prompt lengths, expected them to tell prompt and completion "
            "apart. Call generate() of the PeftModel, or run the model inside steering(model, prompt_lengths=[...])."
        )
    return request.by_model_row(request.prompt_lengths, rows)


def token_mask(scope: str, tokens: int, lengths: torch.Tensor) -> torch.Tensor:
    """`[B, T, 1]`: where a vector of this scope steers in the forward that this thread is in."""
    ranks = current_ranks()
    if ranks is None or ranks.shape[1] != tokens:
        raise ModelError(
            "token_scope: the decoder layers were run without their decoder, so the positions of the tokens are "
            "unknown. Call the model, or use vectors with token_scope='all'."
        )
    return scope_mask(scope, ranks, lengths)[:, :, None]
