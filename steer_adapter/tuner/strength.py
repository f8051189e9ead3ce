"""The dial: the strength of vectors, on any model that carries them, for good or for the calls inside a block."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from steer_adapter.errors import AdapterNameError, ConfigError, ModelError
from steer_adapter.files.json_file import shorten

from .layer import SteerLayer, steer_layers
from .request import BASE, Request, Value, requested


_LARGEST = torch.finfo(torch.float32).max


def set_multiplier(model: nn.Module, value: float, adapter_name: str | None = None) -> None:
    """Set the strength of steering vectors while a model runs. It is absolute, and never saved.

    Args:
        model (`nn.Module`): a [`~peft.PeftModel`], or a transformers model with natively loaded adapters.
        value (`float`): the multiplier: 1 as trained, 0 off, negative reversed.
        adapter_name (`str`, *optional*): whose multiplier; by default that of all active vectors.

    Raises:
        ConfigError: the value is not a finite number, or too large for float32.
        AdapterNameError: there is no vector of this name.
        ModelError: the model carries no steering vector.
    """
    # Compared before it is converted: an integer may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not abs(value) <= _LARGEST:
        raise ConfigError(f"`value`: received {shorten(value)}, expected a finite number (float32).")
    layers = _layers(model)
    names = sorted({name for layer in layers for name in layer.steer_vector})
    if adapter_name is not None and adapter_name not in names:
        raise AdapterNameError(f"`adapter_name`: received {adapter_name!r}, expected one of {names}.")
    for layer in layers:
        for name in layer.active_adapters if adapter_name is None else [adapter_name]:
            if name in layer.steer_vector:
                layer.set_multiplier(name, float(value))


def set_adapters(model: nn.Module, multipliers: Mapping[str, float]) -> None:
    """Make these vectors the active ones, each with its own strength; other kinds of adapters stay as they are.

    Args:
        model: a [`~peft.PeftModel`], or a transformers model with natively loaded vectors.
        multipliers: by name, e.g. `{"cheerful": 1.0, "verbose": -0.5}`; vectors that are not named rest.

    Raises:
        ConfigError: a value is not a finite number.
        AdapterNameError: there is no vector of a name, or none is named.
        ModelError: the model carries no steering vector.
    """
    layers = _layers(model)
    if not isinstance(multipliers, Mapping) or not multipliers:
        raise AdapterNameError(f"`multipliers`: received {multipliers!r}, expected {{name: multiplier}}.")
    _check_names(layers, multipliers, with_library=False)
    values = {name: _value(value, f"multipliers[{name!r}]") for name, value in multipliers.items()}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            raise ConfigError(f"`multipliers[{name!r}]`: received {multipliers[name]!r}, expected a finite number.")
    names = list(multipliers)
    trains = any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    owners = [module for module in model.modules() if getattr(type(module), "tuner_layer_cls", None) is SteerLayer]
    for owner in owners or layers:
        owner.set_adapter(names, inference_mode=not trains)
    for name, value in values.items():
        set_multiplier(model, value, name)


@contextmanager
def steering(
    model: nn.Module,
    multiplier: float | Sequence[float] | torch.Tensor | Mapping[str, Any] | None = None,
    adapter_names: Sequence[str] | None = None,
    prompt_lengths: Sequence[int] | torch.Tensor | None = None,
) -> Iterator[None]:
    """Set strength, vectors and prompt lengths for the calls of the model inside the block.

    It holds for the thread or task that enters the block, for the tasks and threads that are started inside it (those
    of a streamer; not workers of a pool), and for the gradients of what ran inside. Other threads and the settings of
    the model are left alone. Inside another block, what is not given is taken from that one; values by name leave the
    other vectors at its values.

    Args:
        model: a PeftModel, or a transformers model with natively loaded vectors or an attached library.
        multiplier: a float, or one value per row `[B]`, for all vectors that steer. By name, `{"adapter": 2.0}` (a
            float or one value per row each): those vectors steer, active or not, and the others as they would.
        adapter_names: the vector of each row, `"__base__"` for none; of adapters, or of an attached library.
        prompt_lengths: the number of tokens in the prompt of each row, without padding; for vectors whose
            `token_scope` is not `"all"`. `generate` of a PeftModel finds them by itself.

    Raises:
        ConfigError: a value is not finite, or they are not for the same number of rows.
        AdapterNameError: there is no vector of a name.
        ModelError: the model carries no vectors, or they are merged; inside the block, if the model runs another
            number of rows.

    Example:

        ```py
        >>> with steering(model, multiplier=[1.0, 0.0, -2.0]):
        ...     model.generate(**batch_of_three)
        >>> with steering(model, adapter_names=["cheerful", "__base__", "honest"]):
        ...     model(**batch_of_three)
        ```
    """
    layers = _layers(model)
    _check_unmerged(layers, "multiplier" if adapter_names is None else "adapter_names")
    if multiplier is None and adapter_names is None and prompt_lengths is None:
        raise ConfigError("steering: received nothing to set, expected a multiplier, adapter_names or prompt_lengths.")
    values: Value | dict[str, Value] | None
    if isinstance(multiplier, Mapping):
        values = {name: _value(value, f"multiplier[{name!r}]") for name, value in multiplier.items()}
        _check_names(layers, values, with_library=adapter_names is not None)
    else:
        values = None if multiplier is None else _value(multiplier, "multiplier")
    names = None if adapter_names is None else _names(layers, adapter_names)
    lengths = None if prompt_lengths is None else _lengths(prompt_lengths)
    _check_rows(values, names, lengths)
    with requested(Request(frozenset(layers), values, names, lengths)):
        yield


def generation_request(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
    """What `generate` with these arguments knows: how often a row is repeated, and the lengths of the prompts."""
    layers = steer_layers(model)
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    request = Request(frozenset(layers), copies=copies_of({"generation_config": config, **kwargs}))
    if all(scope == "all" for layer in layers for scope in layer.scopes.values()):
        return request
    lengths = _prompt_lengths(model, args, kwargs)
    return request if lengths is None else Request(request.layers, prompt_lengths=lengths, copies=request.copies)


def copies_of(kwargs: Mapping[str, Any]) -> int:
    """How many rows `generate` makes of one: its beams or its returned sequences, whichever are more."""
    config = kwargs.get("generation_config")
    return max(kwargs.get(key) or getattr(config, key, None) or 1 for key in ("num_beams", "num_return_sequences"))


def _prompt_lengths(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None  # what the decoder begins with is generate's own business
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask.long().sum(dim=1)
    inputs = next(
        (v for v in (*args[:1], *map(kwargs.get, ("inputs", "input_ids", "inputs_embeds"))) if v is not None), None
    )
    # Without a mask, transformers would guess which tokens are padding.
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    if inputs is None or (inputs.ndim == 2 and pad is not None and bool((inputs == pad).any())):
        return None
    return torch.full((len(inputs),), inputs.shape[1], dtype=torch.int64, device=inputs.device)


def _layers(model: nn.Module) -> tuple[SteerLayer, ...]:
    layers = steer_layers(model)
    if not layers:
        raise ModelError(f"{type(model).__name__} carries no steering vector. Add or load one first.")
    return layers


def _check_unmerged(layers: Sequence[SteerLayer], argument: str) -> None:
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        # The words of PEFT's own layers, here and for unknown names.
        raise ModelError(
            f"Cannot pass `{argument}` when there are merged adapters, please call `unmerge_adapter` first: {merged} "
            "are folded into biases, which steer every call alike."
        )


def _value(value: Any, what: str) -> Value:
    """A float, or `[B]` float32; a tensor keeps its graph."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        tensor = torch.tensor(math.nan)
    if isinstance(value, (bool, str)) or tensor.ndim > 1 or not tensor.numel() or not tensor.isfinite().all():
        raise ConfigError(f"`{what}`: received {shorten(value)}, expected a finite number, or one for each row.")
    return tensor if tensor.ndim else float(value)


def _names(layers: Sequence[SteerLayer], names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise AdapterNameError(f"`adapter_names`: received {names!r}, expected a list with a name for each row.")
    _check_names(layers, names, BASE)
    return tuple(names)


def _check_names(layers: Sequence[SteerLayer], names: Any, *others: str, with_library: bool = True) -> None:
    libraries = {layer.library.library for layer in layers if layer.library is not None and with_library}
    holders = (others, *libraries, *(layer.steer_vector for layer in layers))
    known = (name for name in names if isinstance(name, str) and any(name in holder for holder in holders))
    if unknown := sorted({str(name) for name in names} - set(known)):
        adapters = sorted({*others, *(name for layer in layers for name in layer.steer_vector)})
        library = " or the library" if libraries else ""
        raise AdapterNameError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; expected names from {adapters}"
            f"{library}."
        )


def _lengths(lengths: Sequence[int] | torch.Tensor) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.tensor(0.0)
    if tensor.ndim != 1 or tensor.is_floating_point() or not tensor.numel() or bool((tensor < 1).any()):
        raise ConfigError(f"`prompt_lengths`: received {lengths!r}, expected a positive integer for each row.")
    return tensor.long()


def _check_rows(values: Any, names: tuple[str, ...] | None, lengths: torch.Tensor | None) -> None:
    by_row = [*(values.values() if isinstance(values, dict) else [values]), names, lengths]
    counts = {len(value) for value in by_row if isinstance(value, (tuple, torch.Tensor))}
    if len(counts) > 1:
        raise ConfigError(f"steering: received values for {sorted(counts)} rows, expected as many of each.")
