"""The tuner: puts a [`SteerLayer`] on each steered decoder layer, and keeps its hands off every other adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from steer_adapter.errors import AdapterNameError, SteerError

from . import folding
from .config import SteerConfig
from .layer import SteerLayer, steer_layers
from .positions import forget_ranks, note_ranks
from .request import Request, requested
from .saved import checkpoint_key
from .state_dict import vectors_to_load, vectors_to_save
from .strength import copies_of, generation_request, set_multiplier, steering
from .targets import check_key, check_name, decoder_of, device_of, resolve


class SteerModel(BaseTuner):
    """
    Steers a model with vectors added to the output of its decoder layers (CAA, arXiv 2312.06681; BiPO, arXiv
    2406.00045). No weight of the model changes unless vectors are merged, and no module is renamed or replaced.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to steer, or a [`~peft.PeftModel`] around it.
        config ([`SteerConfig`]): The configuration of the vector.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create the vectors on the meta device, to be replaced by loaded ones.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from steer_adapter import SteerConfig

        >>> model = get_peft_model(model, SteerConfig(layers_to_transform=15, task_type="CAUSAL_LM"))
        >>> model.set_multiplier(2.0)
        ```
    """

    prefix: str = "steer_"
    tuner_layer_cls = SteerLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: SteerConfig | dict[str, SteerConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self._targets: dict[str, int] = {}
        if isinstance(peft_config, dict):  # as from a PeftModel; transformers adds its adapters one by one
            _refuse_second(model, adapter_name)
        # On a transformers model all adapters share one dict; around another tuner, each keeps its own.
        books = getattr(model, "peft_config", None)
        known = dict(books) if isinstance(books, dict) else None
        if not _is_tuned(model) and not isinstance((known or {}).get(adapter_name), (SteerConfig, type(None))):
            raise AdapterNameError(
                f"adapter_name: received {adapter_name!r}, which the model uses for another adapter; expected a new "
                "name."
            )
        try:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except Exception:
            if isinstance(books, dict):
                books.clear()
                books.update(known or {})
            raise
        if _is_tuned(model):
            model.peft_config = books

    def __getattr__(self, name: str) -> Any:
        if name == "peft_config" and _is_tuned(self.model):
            raise AttributeError(name)
        return super().__getattr__(name)

    ###########
    # Strength #
    ###########

    def set_multiplier(self, value: float, adapter_name: str | None = None) -> None:
        """See [`steer_adapter.set_multiplier`]."""
        set_multiplier(self, value, adapter_name)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float] | None, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """See [`steer_adapter.add_weighted_adapter`]."""
        from .combine import add_weighted_adapter

        add_weighted_adapter(self, adapters, weights, adapter_name, *args, **kwargs)

    #############
    # Injection #
    #############

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        check_name(adapter_name, model)
        given = self.peft_config[adapter_name]
        is_first = not any(True for _ in self._steer_layers())
        values = dict(vars(given))
        resolved, self._targets = resolve(given, model)
        check_key(adapter_name, self._targets)
        others = [config for name, config in self.peft_config.items() if name != adapter_name]
        if not any(config is given for config in others):  # else they would share what is set later
            resolved = given.filled_in(resolved)
        self.peft_config[adapter_name] = resolved
        if state_dict is not None:
            state_dict = {key.replace(".steering.steer_", ".steer_"): value for key, value in state_dict.items()}
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            vars(given).update(values)
            self.peft_config[adapter_name] = given
            raise
        # From here on the vector is there, or NaN; a second one made from this config starts anew.
        resolved.format_version = None
        if is_first and not given.inference_mode:
            # PEFT restores what was trainable before, so a LoRA below would be trained along.
            self._freeze_all_but_vectors(model)

    def _prepare_adapter_config(self, peft_config: SteerConfig, model_config: dict) -> SteerConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: SteerConfig, key: str) -> bool:
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: SteerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        steering = getattr(target, "steering", None)
        if steering is None:
            steering = SteerLayer(self._targets[current_key])
            steering.attach(target)
        steering.update_layer(adapter_name, peft_config, device_of(target))
        if peft_config.token_scope != "all":
            note_ranks(self.model.get_submodule(decoder_of(current_key)))

    def _freeze_all_but_vectors(self, model: nn.Module) -> None:
        vectors = {id(p) for layer in self._steer_layers() for p in layer.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in vectors:
                parameter.requires_grad = False

    ###########
    # Running #
    ###########

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, copies = kwargs.get("adapter_names"), copies_of(kwargs)
        if names is not None and self.training:
            raise SteerError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval(), or, to train with "
                "another vector in each row, run the model inside steering(model, adapter_names=[...])."
            )
        with ExitStack() as stack:
            if names is not None:
                stack.enter_context(steering(self, adapter_names=names))
            if copies > 1:  # a PeftModel without task type does not generate through `generate` below
                stack.enter_context(requested(Request(frozenset(steer_layers(self)), copies=copies)))
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model, for which prompts and beams are known."""
        with requested(generation_request(self, args, kwargs)):
            return self.model.generate(*args, **kwargs)

    ##########################################################
    # PEFT does the following to the layers of every tuner; #
    # here it is done to vectors only.                       #
    ##########################################################

    def _steer_layers(self) -> list[SteerLayer]:
        return [module for module in self.model.modules() if isinstance(module, SteerLayer)]

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for layer in self._steer_layers():
            layer.enable_adapters(enabled)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active vector, or several at once given a list of names.

        Raises:
            AdapterNameError: there is no vector of a name.
        """
        if any(layer.merged for layer in self._steer_layers()):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self._check_is_vector(name)
        self._activate(adapter_name, inference_mode)

    def _activate(self, names: str | list[str], inference_mode: bool = False) -> None:
        for layer in self._steer_layers():
            layer.set_adapter(names, inference_mode=inference_mode)
        self.active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for layer in self._steer_layers():
            layer.set_requires_grad(adapter_names, requires_grad=requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to cast: vectors are float32 from the start and stay so."""

    def _check_is_vector(self, name: str) -> None:
        if not isinstance(self.peft_config.get(name), SteerConfig):
            vectors = [key for key, config in self.peft_config.items() if isinstance(config, SteerConfig)]
            raise AdapterNameError(f"adapter_name: received {name!r}, expected one of the vectors {vectors}.")

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a vector. If it was the only active one, the first that remains becomes active."""
        self._check_is_vector(adapter_name)
        was_active = self.active_adapters
        super().delete_adapter(adapter_name)
        if adapter_name not in was_active:
            self.active_adapter = was_active
            return
        remaining = [name for name, config in self.peft_config.items() if isinstance(config, SteerConfig)]
        self._activate([name for name in was_active if name != adapter_name] or remaining[:1])

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            folding.merge(self.model, self.peft_config, self._to_merge(adapter_names))
            folding.keep(self.model)
        else:
            self._unfold()
        for module in list(self.model.modules()):
            steering = module._modules.get("steering")
            if isinstance(steering, SteerLayer):
                steering.detach(module)
            forget_ranks(module)
        if not _is_tuned(self.model) and hasattr(self.model, "peft_config"):
            # Not emptied, but replaced: a PeftModel around this one goes on with its own.
            books = self.model.peft_config
            del self.model.peft_config
            if others := {name: config for name, config in books.items() if not isinstance(config, SteerConfig)}:
                self.model.peft_config = others
        return self.model

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold vectors into biases of the model, where it has an exact place for them. `unmerge_adapter` undoes it.

        Args:
            adapter_names: which vectors; by default the active ones.
            safe_merge: makes no difference: a value that is not finite is always refused.

        Raises:
            SteerError: a vector can't be folded exactly, or vectors are disabled; nothing has changed.
        """
        if any(layer.disable_adapters for layer in self._steer_layers()):
            raise SteerError(
                "merge_adapter: received a model whose vectors are disabled, expected them enabled; nothing was "
                "changed. Leave disable_adapter(), or call enable_adapter_layers() first."
            )
        folding.merge(self.model, self.peft_config, self._to_merge(adapter_names))

    def unmerge_adapter(self) -> None:
        """Restore the biases that `merge_adapter` changed, bitwise."""
        if not any(layer.merged for layer in self._steer_layers()):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self._unfold()

    def _unfold(self) -> None:
        for layer in self._steer_layers():
            layer.unfold()

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return self.active_adapters if adapter_names is None else adapter_names

    ##############
    # Saved form #
    ##############

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SteerConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        return vectors_to_save(model, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return checkpoint_key(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SteerConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return vectors_to_load(
            model, adapter_name, state_dict, lambda key: cls._remove_adapter_name_from_key(key, adapter_name)
        )


def _refuse_second(model: nn.Module, adapter_name: str) -> None:
    """A tuner switches, freezes and unloads the vectors of a model, so there is one, or none with native adapters."""
    check_name(adapter_name, model)
    present = sorted({name for layer in steer_layers(model) for name in layer.steer_vector})
    if present:
        raise SteerError(
            f"The model carries the steering vectors {present} already, expected none: a PeftModel around it would "
            f"switch them off. Add {adapter_name!r} where they are, with add_adapter(...) or load_adapter(...), and "
            "activate several with model.base_model.set_adapter([...]), or with model.set_adapter([...]) if they are "
            "loaded into a transformers model."
        )


def _is_tuned(model: nn.Module) -> bool:
    return isinstance(model, (PeftModel, BaseTuner))
