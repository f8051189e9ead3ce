"""What one layer is asked to do with one batch: its live settings, and the request of the caller."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from steer_adapter.errors import ModelError

from .positions import scope_mask
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


def ask(layer: SteerLayer, rows: int, device: torch.device, ranks: torch.Tensor | None) -> Asked:
    """What a layer is asked to do with hidden states of so many rows; `ranks` only where vectors have a scope."""
    if layer.disable_adapters:
        return Asked({})
    request = request_for(layer)
    if request is not None:
        request.check_names(rows)

    def in_scope(strength: torch.Tensor, scope: str) -> torch.Tensor:
        by_row = strength[:, None, None] if strength.ndim else strength
        return by_row if scope == "all" else by_row * _mask(request, scope, rows, ranks).to(strength.device)

    multipliers = {
        name: in_scope(_strength(layer, request, name, rows), layer.scopes[name]) for name in _wanted(layer, request)
    }
    if layer.library is None or request is None or request.names is None:
        return Asked(multipliers)
    return Asked(multipliers, layer.library.pick(request, rows, device, in_scope))


def _wanted(layer: SteerLayer, request: Request | None) -> list[str]:
    """The vectors that rows name; without names the active ones, and those that a value is given for.

    Those that are merged steer by way of a bias.
    """
    if request is None or request.names is None:
        values = {} if request is None else request.multiplier
        named = (*layer.active_adapters, *(values if isinstance(values, dict) else ()))
    else:
        named = request.names
    return [name for name in dict.fromkeys(named) if name in layer.steer_vector and name not in layer.merged_adapters]


def _strength(layer: SteerLayer, request: Request | None, name: str, rows: int) -> torch.Tensor:
    live = layer.multipliers[name]
    return live if request is None else request.strength(name, live, rows)


def _mask(request: Request | None, scope: str, rows: int, ranks: torch.Tensor | None) -> torch.Tensor:
    """`[B, T, 1]`: where a vector of this scope steers."""
    if request is None or request.prompt_lengths is None:
        raise ModelError(
            f"token_scope={scope!r}: the model was called without prompt lengths, expected them to tell prompt and "
            "completion apart. Call generate() of the PeftModel (of a decoder-only model, and with "
            "SteerConfig(task_type='CAUSAL_LM'): PEFT's class without a task passes the vector by), or run the model "
            "inside steering(model, prompt_lengths=[...])."
        )
    if ranks is None:
        raise ModelError(
            f"token_scope={scope!r}: the decoder layers were run without their decoder, so the positions of the "
            "tokens are unknown. Call the model, or use vectors with token_scope='all'."
        )
    lengths = request.by_model_row(request.prompt_lengths, rows)
    return scope_mask(scope, ranks, lengths)[:, :, None]
