"""A command that torchrun or accelerate has started several times: one of the processes speaks and writes."""

from __future__ import annotations

import gc
from typing import Any

from accelerate import PartialState


def one_speaks() -> bool:
    """Whether this process is the one that prints and writes; the bars of the others are switched off."""
    if PartialState().is_main_process:
        return True
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    return False


def end_processes() -> None:
    """Close the connections between processes, once nothing trains any more.

    Threads of connections that are still there when the interpreter ends abort it now and then: whatever holds them
    (DistributedDataParallel, in a cycle) is collected first.
    """
    gc.collect()
    PartialState().destroy_process_group()


def all_of(trainer: Any, dataset: Any) -> list[dict[str, Any]]:
    """All batches of a prepared dataset; the loaders of a trainer give each process a part."""
    size = trainer.args.per_device_eval_batch_size
    starts = range(0, len(dataset), size)
    return [trainer.data_collator([dataset[i] for i in range(s, min(s + size, len(dataset)))]) for s in starts]
