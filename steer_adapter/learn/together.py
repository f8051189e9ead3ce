"""Several vectors in one run: a layer search, or other settings on the same pairs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from steer_adapter.errors import ConfigError
from steer_adapter.tuner import SteerConfig
from steer_adapter.tuner.targets import resolve

from .bipo import BiPOTrainer
from .bipo_config import BiPOConfig
from .carriers import innermost
from .shared_states import SharedStates


def trainers_together(
    model: nn.Module, configs: Mapping[str, SteerConfig], args: BiPOConfig, **kwargs: Any
) -> Iterator[tuple[str, BiPOTrainer]]:
    """
    A trainer for each vector, one after the other on the same model and the same pairs.

    Each vector becomes the one that it would become alone, up to rounding. What is frozen is computed once for all of
    them: the first trainer's pass over the data records the states below every vector, and the reference. The vector
    is taken off the model before the next trainer comes.

        configs = {f"layer-{i}": SteerConfig(layers_to_transform=i) for i in range(8, 21)}
        for name, trainer in trainers_together(model, configs, args, train_dataset=pairs, processing_class=tokenizer):
            trainer.train()
            trainer.save_model()  # to the folder `name` in args.output_dir

    Args:
        model: a transformers model, or a PeftModel with a LoRA.
        configs: of the vectors, by name of their folder in `args.output_dir` ("." is that folder itself).
        args: for all. `prefix_cache_memory` holds for all together.
        kwargs: for each [`BiPOTrainer`].

    Raises:
        ConfigError: there is no vector to train, or a name that can't be a folder's.
        ModelError: a vector has no place on the model; none is trained.
    """
    _check(configs)
    base = innermost(model) if isinstance(model, PeftModel) else model
    states = SharedStates({depth for config in configs.values() if (depth := _depth(config, base))})
    try:
        for name, config in configs.items():
            with _own_forward(base):
                trainer = BiPOTrainer(model=model, args=_in_folder(args, name), peft_config=config, **kwargs)
                trainer.shared_states = states
                try:
                    yield name, trainer
                finally:
                    trainer.model.unload()
    finally:
        states.close()


def _check(configs: Mapping[str, SteerConfig]) -> None:
    if not configs:
        raise ConfigError("`configs`: received none, expected a SteerConfig for each vector to train.")
    for name in configs:
        if not isinstance(name, str) or name in ("", "..") or any(c in name for c in "/\\\0"):
            raise ConfigError(f"`configs`: received the name {name!r}, expected one that a folder can have.")


def _depth(config: SteerConfig, base: nn.Module) -> int | None:
    """How many layers are frozen below the vector, itself included; None if it is not on decoder layers."""
    resolved, _ = resolve(copy.deepcopy(config), base)
    layers = resolved.layers_to_transform
    return min(layers) + 1 if isinstance(layers, list) else None


def _in_folder(args: BiPOConfig, name: str) -> BiPOConfig:
    own = copy.deepcopy(args)
    own.output_dir = str(Path(args.output_dir) / name)
    return own


@contextmanager
def _own_forward(base: nn.Module) -> Iterator[None]:
    """Put back the forward that DPOTrainer replaces on the model, or its replacements would pile up."""
    before = vars(base).get("forward")
    try:
        yield
    finally:
        vars(base).pop("forward", None)
        if before is not None:
            base.forward = before
