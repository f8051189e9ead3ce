"""How compiled code learns what is asked for: as data, from operators that run when it runs.

What torch.compile traces, it fixes or guards: a strength or a name read while tracing would be stale afterwards, or
compile everything again with each change. These operators are opaque to it, and look at the live settings and the
request of the caller each time.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from .asked import Asked, prompt_lengths, strengths, token_mask
from .request import request_for


if TYPE_CHECKING:
    from .layer import SteerLayer

_layers: WeakValueDictionary[int, SteerLayer] = WeakValueDictionary()
_keys = count()


def register(layer: SteerLayer) -> torch.Tensor:
    """The key by which operators find a layer. A tensor: layers that differ in a number share no compiled code."""
    key = next(_keys)
    _layers[key] = layer
    return torch.tensor(key)


def traced(layer: SteerLayer, hidden_states: torch.Tensor) -> Asked:
    """`ask` for code that is being compiled: every vector of the layer has a multiplier, 0 for those that rest."""
    rows, tokens, hidden_size = hidden_states.shape
    device = hidden_states.device
    values = torch.ops.steer_adapter.multipliers(layer.key, len(layer.steer_vector), rows, device)
    multipliers = {}
    for index, name in enumerate(layer.steer_vector):
        multipliers[name] = values[index][:, None, None]
        if layer.scopes[name] != "all":
            lengths = torch.ops.steer_adapter.prompt_lengths(layer.key, rows, device)
            multipliers[name] = multipliers[name] * token_mask(layer.scopes[name], tokens, lengths)
    if layer.library is None:
        return Asked(multipliers)
    return Asked(multipliers, torch.ops.steer_adapter.picked(layer.key, rows, hidden_size, device))


@torch.library.custom_op("steer_adapter::multipliers", mutates_args=())
def _multipliers(key: torch.Tensor, vectors: int, rows: int, device: torch.device) -> torch.Tensor:
    layer = _layers[int(key)]
    result = torch.zeros(vectors, rows, device=device)
    if layer.disable_adapters:
        return result
    request = request_for(layer)
    asked = strengths(layer, request, rows)
    for index, name in enumerate(layer.steer_vector):
        if name in asked:
            layer.checked_vector(name)
            if layer.scopes[name] != "all":
                prompt_lengths(request, rows)
            result[index] = asked[name]
    return result


@_multipliers.register_fake
def _(key: torch.Tensor, vectors: int, rows: int, device: torch.device) -> torch.Tensor:
    return torch.empty(vectors, rows, device=device)


@torch.library.custom_op("steer_adapter::prompt_lengths", mutates_args=())
def _prompt_lengths(key: torch.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    request = request_for(_layers[int(key)])
    if request is None or request.prompt_lengths is None:  # an error only if a vector needs them, see above
        return torch.ones(rows, dtype=torch.int64, device=device)
    return prompt_lengths(request, rows).to(device, copy=True)


@_prompt_lengths.register_fake
def _(key: torch.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    return torch.empty(rows, dtype=torch.int64, device=device)


@torch.library.custom_op("steer_adapter::picked", mutates_args=())
def _picked(key: torch.Tensor, rows: int, hidden_size: int, device: torch.device) -> torch.Tensor:
    layer = _layers[int(key)]
    request = request_for(layer)
    if layer.disable_adapters or layer.library is None or request is None or request.names is None:
        return torch.zeros(rows, 1, hidden_size, device=device)
    return layer.library.pick(request, rows, device)


@_picked.register_fake
def _(key: torch.Tensor, rows: int, hidden_size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(rows, 1, hidden_size, device=device)
