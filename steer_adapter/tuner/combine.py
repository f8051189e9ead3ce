"""Several vectors made into one new adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from steer_adapter.errors import AdapterNameError, ConfigError
from steer_adapter.files.json_file import shorten
from steer_adapter.merging import COMBINATIONS, SIGN_COMBINATIONS, SPARSE_COMBINATIONS

from .config import SteerConfig
from .layer import SteerLayer


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    adapter_name: str,
    combination_type: str = "linear",
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Add an adapter that combines others. It is not activated.

    Where an adapter does not steer a layer, its vector there counts as zero; the new one steers all layers that any of
    them does. Its multiplier is 1 (for `mean` the mean of theirs), and the multipliers of the others don't enter.

    Args:
        model: a PeftModel with vectors, or a transformers model with natively loaded ones.
        adapters: names of the vectors to combine.
        weights: one for each, negative ones included; `None` means 1 each, and is the only choice for `mean`.
        adapter_name: name of the new adapter.
        combination_type: `linear` (exact sum), `mean`, `orthogonal`, or one of PEFT's `ties`, `dare_linear`,
            `dare_ties`, `magnitude_prune`.
        density: share of the entries that PEFT's methods keep, in (0, 1].
        majority_sign_method: `total` or `frequency`, for `ties` and `dare_ties`.

    Raises:
        AdapterNameError: an adapter is unknown or not a vector, or the new name is taken.
        ConfigError: an argument does not fit.
    """
    books = getattr(model, "peft_config", None) or {}
    _check_names(books, adapters, adapter_name)
    chosen = _check_weights(weights, len(adapters), combination_type)
    _check_method(combination_type, density, majority_sign_method)
    config = _combined_config([books[name] for name in adapters], combination_type)

    _inject(model, adapter_name, config)
    for layer in _layers(model):
        if adapter_name in layer.steer_vector:
            new = layer.steer_vector[adapter_name].requires_grad_(False)
            zero = torch.zeros_like(new)
            vectors = [layer.steer_vector[n].detach() if n in layer.steer_vector else zero for n in adapters]
            with torch.no_grad():
                new.copy_(_combine(vectors, chosen.to(new.device), combination_type, density, majority_sign_method))


def _inject(model: nn.Module, adapter_name: str, config: SteerConfig) -> None:
    """Add a zero vector, and leave active what was active."""
    if isinstance(model, (PeftModel, BaseTuner)):
        tuner = model.base_model if isinstance(model, PeftModel) else model
        tuner.peft_config[adapter_name] = config
        try:
            tuner.inject_adapter(tuner.model, adapter_name)
        except Exception:
            del tuner.peft_config[adapter_name]
            raise
        return
    layer = _layers(model)[0]
    active, trains = layer.active_adapters, any(p.requires_grad for p in layer.parameters())
    inject_adapter_in_model(config, model, adapter_name)
    for layer in _layers(model):
        layer.set_adapter(active, inference_mode=not trains)


def _combine(
    vectors: list[torch.Tensor], weights: torch.Tensor, method: str, density: float | None, sign_method: str
) -> torch.Tensor:
    if method in COMBINATIONS:
        return COMBINATIONS[method](vectors, weights)
    options = {"majority_sign_method": sign_method} if method in SIGN_COMBINATIONS else {}
    return SPARSE_COMBINATIONS[method](vectors, weights, density=density, **options)


def _layers(model: nn.Module) -> list[SteerLayer]:
    return [module for module in model.modules() if isinstance(module, SteerLayer)]


def _check_names(books: dict[str, object], adapters: Sequence[str], adapter_name: str) -> None:
    if isinstance(adapters, str):
        raise AdapterNameError(f"`adapters`: received the string {adapters!r}, expected a list of names.")
    vectors = [name for name, config in books.items() if isinstance(config, SteerConfig)]
    unknown = [name for name in adapters if name not in vectors]
    if unknown or not adapters:
        raise AdapterNameError(f"`adapters`: received {list(adapters)}, expected names from {vectors}.")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise AdapterNameError(f"`adapter_name`: received {adapter_name!r}, expected a name without dots.")
    if adapter_name in books:
        raise AdapterNameError(
            f"`adapter_name`: received {adapter_name!r}, which exists already; expected a new name."
        )


def _check_weights(weights: Sequence[float] | None, count: int, method: str) -> torch.Tensor:
    if weights is None:
        return torch.ones(count)
    if method == "mean":
        raise ConfigError(f"`weights`: received {weights!r}, expected None: the mean has no weights.")
    try:
        numbers = torch.tensor([float(weight) for weight in weights])
    except (TypeError, ValueError, OverflowError):
        numbers = torch.tensor([])
    if len(numbers) != count or not numbers.isfinite().all():
        raise ConfigError(
            f"`weights`: received {shorten(weights)}, expected {count} finite numbers (float32), one for each adapter."
        )
    return numbers


def _check_method(method: str, density: float | None, sign_method: str) -> None:
    names = [*COMBINATIONS, *SPARSE_COMBINATIONS]
    if method not in names:
        raise ConfigError(f"`combination_type`: received {method!r}, expected one of {names}.")
    if (method in SPARSE_COMBINATIONS) != (density is not None):
        expected = "a share in (0, 1]" if method in SPARSE_COMBINATIONS else "None"
        raise ConfigError(f"`density`: received {density}, expected {expected} with {method!r}.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"`density`: received {density}, expected a share in (0, 1].")
    if sign_method not in ("total", "frequency"):
        raise ConfigError(f"`majority_sign_method`: received {sign_method!r}, expected 'total' or 'frequency'.")


def _combined_config(configs: list[SteerConfig], method: str) -> SteerConfig:
    operations = {config.operation for config in configs}
    if len(operations) > 1:
        raise ConfigError(f"`adapters`: their operations are {sorted(operations)}, expected the same for all.")
    if len({config.target_modules is None for config in configs}) > 1:
        raise ConfigError("`adapters`: some name layers and some target modules, expected the same for all.")
    stacks = {config.stack for config in configs}
    if len(stacks) > 1:
        raise ConfigError(f"`adapters`: their stacks are {sorted(map(str, stacks))}, expected the same for all.")
    combined = copy.copy(configs[0])
    combined.format_version = None  # new, not about to be loaded
    combined.init_weights = True
    combined.provenance = {"method": f"combined ({method})"}  # what was measured holds for its sources
    combined.multiplier = sum(c.multiplier for c in configs) / len(configs) if method == "mean" else 1.0
    if combined.target_modules is None:
        combined.layers_to_transform = sorted({layer for c in configs for layer in _layers_of(c)})
    else:
        combined.target_modules = sorted({name for c in configs for name in _as_list(c.target_modules)})
    return combined


def _layers_of(config: SteerConfig) -> list[int]:
    layers = config.layers_to_transform
    return layers if isinstance(layers, list) else []


def _as_list(names: list[str] | str | None) -> list[str]:
    if isinstance(names, str):
        raise ConfigError(f"`adapters`: one has the regex {names!r} for target modules, expected lists of names.")
    return names or []
