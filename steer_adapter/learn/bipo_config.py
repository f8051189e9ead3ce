"""The configuration of BiPO training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import DPOConfig

from steer_adapter.errors import ConfigError

from .recipes import RECIPES


@dataclass
class BiPOConfig(DPOConfig):
    """
    Configuration of [`BiPOTrainer`]: that of [`~trl.DPOConfig`] with other defaults. `BiPOConfig.recipe(name, ...)`
    gives published settings.

    Args:
        learning_rate (`float`, *optional*):
            By default it is set when training starts, from the norm of the residual stream at the steered layer and
            from the number of steps, see [`~steer_adapter.learn.directions.auto_learning_rate`].
        per_device_train_batch_size (`int`, defaults to 4): Pairs a step, as in the paper.
        num_train_epochs (`float`, defaults to 5): Passes over the data.
        lr_scheduler_type (`str`, defaults to `"cosine"`): As in the paper.
        warmup_steps (`float`, defaults to 0.1): A share of the run; 100 steps in the paper.
        gradient_checkpointing (`bool`, *optional*):
            Off unless asked for: the gradient of one vector needs few activations, so it only costs a second forward.
        bf16 (`bool`, defaults to `False`):
            No autocast: the model runs in the dtype it was loaded in, the vector is float32 in any case.
        prefix_cache (`bool`, defaults to `True`):
            Compute what lies below the first steered layer, and the reference, once for each pair, wherever that is
            exact; otherwise a line says why not.
        prefix_cache_dir (`str`, *optional*):
            A folder to keep it in, for other runs with the same model and layer. By default it is gone when training
            ends.
        prefix_cache_memory (`float`, defaults to 4):
            Gigabytes of it to hold in memory where no folder is given; what is more goes to files in `output_dir`.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate; by default found from the model and the run's length."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Pairs a step and device."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the data."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: steps, or a share of the run below 1."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in backward; deprecated alias of activation_checkpointing."},
    )
    bf16: bool | None = field(default=False, metadata={"help": "Autocast to bfloat16."})
    prefix_cache: bool = field(
        default=True, metadata={"help": "Compute what is frozen once for each pair, where that is exact."}
    )
    prefix_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps what is computed once, for other runs."}
    )
    prefix_cache_memory: float = field(
        default=4.0, metadata={"help": "Gigabytes of it to hold in memory before files are used."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.prefix_cache_memory < math.inf:
            raise ConfigError(
                f"`prefix_cache_memory`: received {self.prefix_cache_memory}, expected gigabytes, 0 or more."
            )
        super().__post_init__()
        # Without an accelerator there is nothing to pin for, and torch warns at every epoch.
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory: bool = False

    @classmethod
    def recipe(cls, name: str, **kwargs: Any) -> BiPOConfig:
        """Published settings by name, e.g. `BiPOConfig.recipe("bipo-persona-llama2", output_dir="out")`.

        Raises:
            ConfigError: there is no recipe of this name.
        """
        if name not in RECIPES:
            raise ConfigError(f"`recipe`: received {name!r}, expected one of {sorted(RECIPES)}.")
        return cls(**{**RECIPES[name], **kwargs})
