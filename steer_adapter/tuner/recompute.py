"""What a layer was asked for in forward, for when gradient checkpointing runs it again in backward.

The second run happens after the `steering` block, in another thread on CUDA, and perhaps with another multiplier set:
what holds then is not what held in forward, and the gradient would be that of another model. The two runs of a layer
have one thing in common, the memory of their input, which checkpointing of either kind keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from steer_adapter.errors import ModelError

from .asked import Asked


@dataclass
class _Entry:
    memory: StorageWeakRef
    asked: Asked | None  # None if the same memory was the input of forwards that asked for different things
    recalled: bool = False


class Recompute:
    """What one layer was asked for, by the memory of its input, for as long as that lives."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def __reduce__(self) -> tuple[type[Recompute], tuple[()]]:
        # A copy has no graphs of its own yet, and weak references to memory must not be copied.
        return (Recompute, ())

    def keep(self, layer_input: torch.Tensor, asked: Asked) -> None:
        """Note what is asked for with this input."""
        for address in [address for address, entry in self._entries.items() if entry.memory.expired()]:
            del self._entries[address]
        entry = self._entries.get(layer_input.data_ptr())
        if entry is None or entry.recalled:
            self._entries[layer_input.data_ptr()] = _Entry(StorageWeakRef(layer_input.untyped_storage()), asked)
        elif entry.asked is not None and not entry.asked.equals(asked):
            entry.asked = None

    def recall(self, layer_input: torch.Tensor) -> Asked | None:
        """What was asked for with this input, or `None` if nothing is known of it.

        Raises:
            ModelError: several forwards with this very tensor asked for different things.
        """
        entry = self._entries.get(layer_input.data_ptr())
        if entry is None or entry.memory.expired():
            return None
        if entry.asked is None:
            raise ModelError(
                "Gradient checkpointing: several forwards with different strengths got the same input tensor, so the "
                "recomputation can't tell them apart. Give each its own copy, e.g. inputs_embeds.clone()."
            )
        entry.recalled = True
        return entry.asked


class Latest:
    """What compiled code was asked for in its last forward, which has no memory to tell forwards apart by."""

    def __init__(self) -> None:
        self._values: list[torch.Tensor] = []
        self._recalled = False

    def keep(self, value: torch.Tensor) -> None:
        """Note what a forward was asked for; only whether there were several matters."""
        if self._recalled:
            self._values, self._recalled = [], False
        if len(self._values) < 2 and not any(torch.equal(value, known) for known in self._values):
            self._values.append(value)

    def recall(self) -> torch.Tensor:
        """What the forwards since the last backward were asked for.

        Raises:
            ModelError: they were asked for different things, or there was none.
        """
        if len(self._values) != 1:
            raise ModelError(
                "torch.compile with gradient checkpointing: several forwards with different strengths came before one "
                "backward, and their recomputation can't tell them apart. Call backward after each, or do without one "
                "of the two."
            )
        self._recalled = True
        return self._values[0].clone()


def in_backward() -> bool:
    """Whether autograd is running, so that a forward in this thread is one of gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def layer_input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The hidden states that a decoder layer was called with."""
    for value in (*args[:1], kwargs.get("hidden_states")):
        if isinstance(value, torch.Tensor):
            return value
    return None
