"""The frozen part of a model below the first steered layer: recorded once, and handed through while the rest trains.

Embeddings, masks, positions and routers stay the model's own business: it runs its own forward, in which the frozen
layers pass their input on and the steered layer returns the recorded states. Its hook then adds the vector as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .head import replaced_forward
from .sharing import Layout


class Prefix:
    """The decoder layers up to and including the first steered one.

    Args:
        layers: the frozen ones in their order, and the steered one as the last. Something must have been recorded
            before anything is replayed.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        self._shapes: list[int | None] = []  # what each layer returns: a tuple of that length, or a tensor
        self._tokens: Callable[[], torch.Tensor] | None = None
        self._states: torch.Tensor | None = None

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor]]:
        """Collect the states `[R, N, H]` that the last of the layers returns, not steered, in each forward inside."""
        seen: list[torch.Tensor] = []
        self._shapes = [None] * len(self.layers)
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):

                def look(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
                    whole = isinstance(output, torch.Tensor)
                    self._shapes[index] = None if whole else len(output)
                    if index == len(self.layers) - 1:
                        seen.append((output if whole else output[0]).detach())

                # Before the hook that steers.
                stack.callback(layer.register_forward_hook(look, prepend=True).remove)
            yield seen

    @contextmanager
    def replaying(self, tokens: Callable[[], torch.Tensor]) -> Iterator[None]:
        """Run only what lies above, inside. `tokens` gives the states `[M, H]` of the batch at hand.

        Held through the backward pass too: gradient checkpointing runs layers again in there.
        """
        self._tokens = tokens
        try:
            with ExitStack() as stack:
                for layer, shape in zip(self.layers[:-1], self._shapes[:-1], strict=True):
                    stack.enter_context(replaced_forward(layer, _hand_through(shape)))
                stack.enter_context(replaced_forward(self.layers[-1], self._recorded))
                yield
        finally:
            self._tokens = self._states = None

    @property
    def replays(self) -> bool:
        """Whether the layers are replaced just now."""
        return self._tokens is not None

    def prepare(self, layout: Layout) -> None:
        """Get the states of the batch that is about to run."""
        if self._tokens is not None:
            self._states = layout.spread(self._tokens())

    def _recorded(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return _in_shape(self._states, self._shapes[-1])


def _hand_through(shape: int | None) -> Callable[..., Any]:
    return lambda hidden_states, *args, **kwargs: _in_shape(hidden_states, shape)


def _in_shape(states: Any, shape: int | None) -> Any:
    return states if shape is None else (states, *(None for _ in range(shape - 1)))
