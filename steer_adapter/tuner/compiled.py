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

from .asked import Asked, ask
from .positions import current_ranks
from .recompute import in_backward


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
    """`ask` for code that is being compiled.

    Without gradients all comes from one operator, and nothing of a vector is left to guard. With gradients the vectors
    are part of the graph, each with a multiplier, 0 for those that rest.
    """
    rows, tokens, hidden_size = hidden_states.shape
    device = hidden_states.device
    ranks = current_ranks(tokens) if layer.is_scoped else None
    steps = tokens if layer.is_scoped else 1
    if not torch.is_grad_enabled():
        return Asked({}, torch.ops.steer_adapter.delta(layer.key, ranks, rows, steps, hidden_size, device))
    values = torch.ops.steer_adapter.multipliers(layer.key, ranks, len(layer.steer_vector), rows, steps, device)
    multipliers = {name: values[index][:, :, None] for index, name in enumerate(layer.steer_vector)}
    if layer.library is None:
        return Asked(multipliers)
    return Asked(multipliers, torch.ops.steer_adapter.picked(layer.key, ranks, rows, steps, hidden_size, device))


def _ask(key: torch.Tensor, rows: int, device: torch.device, ranks: torch.Tensor | None) -> tuple[SteerLayer, Asked]:
    layer = _layers[int(key)]
    return layer, ask(layer, rows, device, ranks)


@torch.library.custom_op("steer_adapter::delta", mutates_args=())
def _delta(
    key: torch.Tensor, ranks: torch.Tensor | None, rows: int, tokens: int, hidden_size: int, device: torch.device
) -> torch.Tensor:
    """Σ m·v of all that steers, `[rows, tokens, hidden_size]` float32; `tokens` is 1 where all are steered alike."""
    layer, asked = _ask(key, rows, device, ranks)
    result = torch.zeros(rows, tokens, hidden_size, device=device)
    for name, multiplier in asked.multipliers.items():
        result += multiplier * layer.checked_vector(name).to(device)
    return result if asked.picked is None else result + asked.picked


@torch.library.custom_op("steer_adapter::multipliers", mutates_args=())
def _multipliers(
    key: torch.Tensor, ranks: torch.Tensor | None, vectors: int, rows: int, tokens: int, device: torch.device
) -> torch.Tensor:
    """The multiplier of each vector of the layer, `[vectors, rows, tokens]` float32."""
    if in_backward():
        return _layers[int(key)].compiled_multipliers.recall()
    layer, asked = _ask(key, rows, device, ranks)
    result = torch.zeros(vectors, rows, tokens, device=device)
    for index, name in enumerate(layer.steer_vector):
        if name in asked.multipliers:
            layer.checked_vector(name)
            multiplier = asked.multipliers[name]
            result[index] = multiplier[:, :, 0] if multiplier.ndim else multiplier
    layer.compiled_multipliers.keep(result.clone())
    return result


@torch.library.custom_op("steer_adapter::picked", mutates_args=())
def _picked(
    key: torch.Tensor, ranks: torch.Tensor | None, rows: int, tokens: int, hidden_size: int, device: torch.device
) -> torch.Tensor:
    """m·v from the library, `[rows, tokens, hidden_size]` float32."""
    _, asked = _ask(key, rows, device, ranks)
    result = torch.zeros(rows, tokens, hidden_size, device=device)
    return result if asked.picked is None else result + asked.picked


@_delta.register_fake
@_picked.register_fake
def _(
    key: torch.Tensor, ranks: torch.Tensor | None, rows: int, tokens: int, hidden_size: int, device: torch.device
) -> torch.Tensor:
    return torch.empty(rows, tokens, hidden_size, device=device)


@_multipliers.register_fake
def _(
    key: torch.Tensor, ranks: torch.Tensor | None, vectors: int, rows: int, tokens: int, device: torch.device
) -> torch.Tensor:
    return torch.empty(vectors, rows, tokens, device=device)
