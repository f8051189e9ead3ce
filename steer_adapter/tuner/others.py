"""What other tuners do to vectors, undone.

PEFT keeps no account of which tuner a layer belongs to: a tuner that saves, loads, switches or freezes does it to the
layers of all. A [`SteerModel`] keeps to its vectors by what it overrides; the methods of the others, such as LoRA, are
those of `BaseTuner`, and are made to pass vectors by from the moment that the first vector is put on a model. On a
model without vectors nothing is different.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from steer_adapter.errors import AdapterNameError, ConfigError

from .config import SteerConfig
from .layer import SteerLayer
from .model import SteerModel
from .saved import PREFIX


_VECTOR = ".steering.steer_vector."
_MARK = "_spares_steering_vectors"


def spare_vectors() -> None:
    """Make the other tuners pass vectors by. Calling it again does nothing."""
    if getattr(BaseTuner, _MARK, False):
        return
    tuner: Any = BaseTuner
    tuner.__init__ = _starting(tuner.__init__)
    tuner._get_adapter_state_dict = classmethod(_saving(tuner._get_adapter_state_dict.__func__))
    tuner._remap_adapter_state_dict_for_load = classmethod(_loading(tuner._remap_adapter_state_dict_for_load.__func__))
    tuner._enable_adapter_layers = _sparing(tuner._enable_adapter_layers)
    tuner.set_requires_grad = _sparing(tuner.set_requires_grad)
    tuner._unload_and_optionally_merge = _unloading(tuner._unload_and_optionally_merge)
    setattr(tuner, _MARK, True)


def _starting(init: Callable[..., None]) -> Callable[..., None]:
    """Around a steered PeftModel, PEFT would write the new adapter over the vector of its name in the books."""

    @wraps(init)
    def init_others(
        self: BaseTuner, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(self, SteerModel):
            return init(self, model, peft_config, adapter_name, *args, **kwargs)
        books = getattr(model, "peft_config", None) or {}
        if not _is_steered(model):
            if isinstance(books.get(adapter_name), SteerConfig):
                raise AdapterNameError(
                    f"adapter_name: received {adapter_name!r}, which the model uses for a steering vector; expected a "
                    "new name."
                )
            return init(self, model, peft_config, adapter_name, *args, **kwargs)
        _refuse_trained_modules(peft_config, adapter_name)
        self.__dict__["peft_config"] = {}
        try:
            init(self, model, peft_config, adapter_name, *args, **kwargs)
        finally:
            model.peft_config = books

    return init_others


def _refuse_trained_modules(peft_config: Any, adapter_name: str) -> None:
    config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            raise ConfigError(
                f"`{name}`: received {getattr(config, name)!r} for an adapter around a steered PeftModel, expected "
                "None: its file would not load without the vector. Put this adapter on the model first, and then the "
                "vector around it."
            )


def _unloading(unload: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Taking another adapter off, which would take the books of the vectors along."""

    @wraps(unload)
    def unload_others(self: BaseTuner, *args: Any, **kwargs: Any) -> nn.Module:
        model = self.model
        inner = model.get_base_model() if _is_steered(model) else model
        books = getattr(inner, "peft_config", None) or {}
        vectors = {name: config for name, config in books.items() if isinstance(config, SteerConfig)}
        self.model = inner
        try:
            unload(self, *args, **kwargs)
        finally:
            self.model = model
        if vectors:
            inner.peft_config = books if _is_steered(model) else vectors
        return model

    return unload_others


def _saving(select: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """Without this, PEFT puts the vectors into the file of a LoRA, from which they come back when it is loaded."""

    @wraps(select)
    def select_others(
        cls: type[BaseTuner],
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        others = {key: value for key, value in state_dict.items() if _VECTOR not in key}
        selected = select(cls, model, config, adapter_name, others, unwanted_adapter_names)
        below = PREFIX * _steer_models_below(model)
        return {PREFIX + key.removeprefix(PREFIX + below) if below else key: selected[key] for key in selected}

    return select_others


def _loading(remap: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """A LoRA around a steered model has its file's keys one level deeper, where PEFT would not find them."""

    @wraps(remap)
    def remap_others(
        cls: type[BaseTuner], model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        below = PREFIX * _steer_models_below(model)
        others = {key: value for key, value in state_dict.items() if not f"{key}.".endswith(_VECTOR)}
        deeper = {
            key if key.startswith(PREFIX + below) else PREFIX + below + key.removeprefix(PREFIX): value
            for key, value in others.items()
        }
        return remap(cls, model, config, adapter_name, deeper if below else others)

    return remap_others


def _sparing(act: Callable[..., None]) -> Callable[..., None]:
    """An act on the layers of all tuners, after which vectors are as they were."""

    @wraps(act)
    def act_on_others(self: BaseTuner, *args: Any, **kwargs: Any) -> None:
        layers = [module for module in self.model.modules() if isinstance(module, SteerLayer)]
        disabled = [layer.disable_adapters for layer in layers]
        trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
        act(self, *args, **kwargs)
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer.enable_adapters(not was_disabled)
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad

    return act_on_others


def _is_steered(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.base_model, SteerModel)


def _steer_models_below(model: nn.Module) -> int:
    """How many PeftModels with vectors a model is around; each lengthens the keys by one prefix."""
    return sum(isinstance(module, SteerModel) for module in model.modules())
