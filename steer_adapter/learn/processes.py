"""What the processes of a run find out together: one of them measures, and all go by that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn


T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold a part of each parameter (FSDP2, tensor parallelism)."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def agreed(model: nn.Module, find: Callable[[], T]) -> T:
    """What the first process finds, for all of them.

    Before FSDP shards a model the others may hold no weights; of one that is sharded already, all must run the
    forward.
    """
    state = PartialState()
    if state.num_processes == 1 or is_sharded(model):
        return find()
    found = [find() if state.is_main_process else None]
    broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]
