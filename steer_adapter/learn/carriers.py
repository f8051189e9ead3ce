"""Models that carry the vector to train: made, checked, and searched for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from steer_adapter.errors import ConfigError, ModelError
from steer_adapter.tuner import SteerConfig, SteerLayer, SteerModel


def with_vector(model: Any, peft_config: Any, seed: int) -> tuple[Any, SteerConfig | None]:
    if peft_config is not None and not isinstance(peft_config, SteerConfig):
        raise ConfigError(f"`peft_config`: received {type(peft_config).__name__}, expected a SteerConfig.")
    if isinstance(model, str):
        if peft_config is None:
            raise ConfigError("`peft_config`: received None, expected a SteerConfig that says which layers to steer.")
        return model, peft_config
    if peft_config is not None:
        set_seed(seed)
        model = get_peft_model(model, peft_config)
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, SteerModel):
        raise ModelError(
            f"`model`: received {type(model).__name__} without a steering vector. Pass "
            "peft_config=SteerConfig(layers_to_transform=...), or a PeftModel made with one."
        )
    the_active_vector(model)
    return model, None


def the_active_vector(model: PeftModel) -> str:
    active = model.active_adapters
    if len(active) != 1 or active[0] == "ref":
        raise ModelError(
            f"`model`: received the active steering adapters {active}, expected exactly one, not named 'ref' (TRL's "
            "name for a reference). Activate the one to train with model.set_adapter(name)."
        )
    return active[0]


def steer_layers(model: nn.Module) -> dict[str, SteerLayer]:
    """Steered layers of the active vector, by path."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SteerLayer) and any(adapter in module.steer_vector for adapter in module.active_adapters)
    }


def copy_vectors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".steering.steer_vector." in n}


def check_trainable(model: nn.Module) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [name for name in trainable if ".steering.steer_vector." not in name]
    if others or not trainable:
        raise ModelError(
            f"Expected the steering vector, and nothing else, to be trainable; received {others[:3] or 'nothing'}. "
            "Load the adapter with is_trainable=True, and freeze other adapters."
        )
    narrow = {name: p.dtype for name, p in trainable.items() if p.dtype != torch.float32}
    if narrow:
        raise ModelError(f"Steering vectors must be float32 to train, received {narrow}.")


@contextmanager
def innermost_base(model: Any) -> Iterator[None]:
    """While DPOTrainer patches the base model's forward, let it find the transformers model below all adapters."""
    if isinstance(model, str):
        yield
        return
    base = innermost(model)
    model.get_base_model = lambda: base
    try:
        yield
    finally:
        del model.get_base_model


def innermost(model: PeftModel) -> Any:
    base = model.get_base_model()
    return innermost(base) if isinstance(base, PeftModel) else base
