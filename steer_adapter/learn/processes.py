"""What the processes of a run find out together: one of them measures, and all go by that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from steer_adapter.errors import ConfigError


T = TypeVar("T")


def check_processes() -> None:
    """
    Raises:
        ConfigError: a launcher started several processes, and accelerate takes each for the only one: without a GPU it
            joins them only if the arguments say `use_cpu`.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    known = PartialState().num_processes
    if started > 1 and known == 1:
        raise ConfigError(
            f"Received {started} processes that don't know of each other, expected them to train together: without a "
            "GPU that takes `use_cpu=True` in the arguments (--use_cpu True)."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold a part of each parameter (FSDP2, tensor parallelism, DeepSpeed ZeRO-3)."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Lets a model run that transformers loaded in parts for DeepSpeed ZeRO-3, before DeepSpeed has prepared it: each
    module's own parameters are whole while it runs."""
    with ExitStack() as hooks, ExitStack() as last:
        for module in model.modules():
            own = [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]
            if own and not hasattr(module, "ds_id"):  # which DeepSpeed gives those that it looks after
                whole = _Whole(own)
                hooks.callback(module.register_forward_pre_hook(whole.begin).remove)
                hooks.callback(module.register_forward_hook(whole.end).remove)
                last.callback(whole.end)  # of a forward that was broken off
        yield


class _Whole:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.context = parameters, ExitStack()

    def begin(self, *_: Any) -> None:
        from deepspeed import zero

        self.context.enter_context(zero.GatheredParameters(self.parameters))

    def end(self, *_: Any) -> None:
        self.context.close()


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
