"""Vectors folded into biases of the model, and taken out again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from steer_adapter.errors import AdapterNameError, SteerError, VectorError

from .config import SteerConfig
from .places import Place, complete, find_places, place_of


if TYPE_CHECKING:
    from .layer import SteerLayer


@dataclass(frozen=True, eq=False)
class Fold:
    """What was done to one bias, so that it can be undone.

    Attributes:
        place: where.
        original: the bias before, `[H]`, or `None` if there was none.
        delta: what was added to it, `[H]`, float32 or wider.
        folded: the bias after, `[H]`.
    """

    place: Place
    original: torch.Tensor | None
    delta: torch.Tensor
    folded: torch.Tensor


def folded_bias(place: Place, shift: torch.Tensor) -> Fold:
    """The bias that moves its layer's output by `shift` (`[H]`, float32): added in float32, cast once."""
    bias = place.projection.bias
    device = place.projection.weight.device
    original = None if bias is None else bias.data
    start = torch.zeros(shift.shape, dtype=place.dtype, device=device) if original is None else original
    start = start.to(torch.promote_types(start.dtype, torch.float32))
    delta = shift.to(start) / place.scale
    return Fold(place, original, delta, (start + delta).to(place.dtype))


def apply_fold(made: Fold) -> None:
    """Put the new bias in its place."""
    bias = made.place.projection.bias
    if bias is None:
        made.place.projection.bias = nn.Parameter(made.folded.clone(), requires_grad=False)
    else:
        bias.data = made.folded.clone()


def undo_fold(made: Fold) -> None:
    """Restore what was there before, bitwise, unless the bias was changed by others since: then only subtract."""
    projection = made.place.projection
    now = projection.bias.data
    if not torch.equal(now, made.folded.to(now)):
        projection.bias.data = (now.to(made.delta.dtype) - made.delta.to(now.device)).to(now.dtype)
    elif made.original is None:
        projection.bias = None
    else:
        projection.bias.data = made.original.to(now)


def _layers_by_path(model: nn.Module) -> dict[str, SteerLayer]:
    """The steering modules of a model, by the path of their decoder layer."""
    from .layer import SteerLayer

    found = ((name, module) for name, module in model.named_modules() if isinstance(module, SteerLayer))
    return {name.rpartition(".")[0]: module for name, module in found}


def merge(model: nn.Module, books: Mapping[str, object], names: Sequence[str]) -> None:
    """Fold the named vectors into the model's biases. Either all of them are, or nothing has changed.

    Args:
        model: the steered model; other tuners may sit between it and the transformers model.
        books: configs by adapter name.
        names: which adapters; those that are merged already stay so, with a warning.

    Raises:
        AdapterNameError: a name is not that of a vector.
        SteerError: a vector is not added to all tokens, or not at a decoder layer, linear layer or layer norm.
        VectorError: a vector, or a bias with it, is not finite.
        ModelError: the architecture has no exact place.
    """
    base = _bare(model)
    layers = _layers_by_path(base)
    names = _not_yet_merged(names, [name for layer in layers.values() for name in layer.merged_adapters])
    _check_foldable(books, names)
    chosen = {path: [n for n in names if n in layer.steer_vector] for path, layer in layers.items()}
    chosen = {path: own for path, own in chosen.items() if own}
    if not chosen:
        return
    _check_finite(layers, chosen)
    places = _find_places(base, books, chosen)
    for path, own in chosen.items():
        _check_result(folded_bias(places[path], layers[path].shift_of(own)), own)
    for path, own in chosen.items():
        layer = layers[path]
        layer.fold(layer.place or places[path], [*layer.merged_adapters, *own])


def keep(model: nn.Module) -> None:
    """Make what is folded a lasting part of the transformers model: its config says so from now on."""
    base = _bare(model)
    places = [layer.place for layer in _layers_by_path(base).values()]
    for flag in sorted({place.flag for place in places if place is not None and place.flag is not None}):
        complete(base, flag)


def _bare(model: nn.Module) -> nn.Module:
    """The transformers model inside any number of tuners."""
    while isinstance(model, (PeftModel, BaseTuner)):
        model = model.base_model if isinstance(model, PeftModel) else model.model
    return model


def _not_yet_merged(names: Sequence[str], merged: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise AdapterNameError(f"`adapter_names`: received the string {names!r}, expected a list of names.")
    new = [name for name in dict.fromkeys(names) if name not in merged]
    # The words of PEFT's own layers.
    if merged and new:
        warnings.warn(
            f"Already following adapters were merged {','.join(dict.fromkeys(merged))}. You are now additionally "
            f"merging {','.join(new)}.",
            stacklevel=4,
        )
    elif merged:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=4)
    return new


def _check_foldable(books: Mapping[str, object], names: Sequence[str]) -> None:
    for name in names:
        config = books.get(name)
        if not isinstance(config, SteerConfig):
            vectors = [key for key, value in books.items() if isinstance(value, SteerConfig)]
            raise AdapterNameError(f"`adapter_names`: received {name!r}, expected names from {vectors}.")
        scope = config.token_scope
        if config.operation != "add":
            raise _refusal(name, f"its operation is {config.operation!r}, and a bias can only add")
        if scope != "all":
            raise _refusal(name, f"its token_scope is {scope!r}, and a bias acts on all tokens")


def _find_places(base: nn.Module, books: Mapping[str, object], chosen: Mapping[str, list[str]]) -> dict[str, Place]:
    own = {path: place for path in chosen if (place := place_of(base.get_submodule(path))) is not None}
    others = [path for path in chosen if path not in own]
    for path in others:
        for name in chosen[path]:
            targets = getattr(books[name], "target_modules", None)
            if targets is not None:
                why = (
                    f"its target_modules={targets!r} match {path}, which is no linear layer or layer norm with a bias"
                )
                raise _refusal(name, why)
    return {**own, **(find_places(base, others) if others else {})}


def _refusal(name: str, why: str) -> SteerError:
    return SteerError(
        f"Folding: received the adapter {name!r}, but {why}; expected one that is added to all tokens, at decoder "
        "layers, or at linear layers or layer norms with a bias. Nothing was changed. Keep the adapter: save it with "
        "save_pretrained(), and load it with PeftModel.from_pretrained()."
    )


def _check_finite(layers: Mapping[str, SteerLayer], chosen: Mapping[str, Sequence[str]]) -> None:
    for path, names in chosen.items():
        for name in names:
            if not torch.isfinite(layers[path].shift_of([name])).all():
                raise _not_finite(name, path)


def _check_result(made: Fold, names: Sequence[str]) -> None:
    if not torch.isfinite(made.folded).all():
        raise _not_finite(",".join(names), f"a bias in {made.folded.dtype}")


def _not_finite(name: str, where: str) -> VectorError:
    # The first sentence is what PEFT's own layers say.
    return VectorError(
        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: multiplier times vector at "
        f"{where} is NaN or infinite, expected finite values. Nothing was changed. Load or train the adapter again."
    )
