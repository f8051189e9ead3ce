"""Between the state dict of a model and the file of a vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from steer_adapter.errors import VectorError

from .layer import SteerLayer
from .saved import PREFIX, check_tensors, checkpoint_key, match_by_layer, without_embeddings


def vectors_to_save(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The vectors of an adapter in a state dict, float32, by their keys there. Those that are sharded are gathered, in
    which all processes must take part.

    Raises:
        VectorError: some are missing or not finite.
    """
    suffix = _suffix(adapter_name)
    vectors = {key: whole(value) for key, value in state_dict.items() if key.endswith(suffix)}
    if len(vectors) != len(_layers(model, adapter_name)):
        raise VectorError(
            f"Adapter {adapter_name!r} has {len(_layers(model, adapter_name))} steering vectors, but {len(vectors)} "
            "were found to save; nothing was saved. Another adapter's name may be part of their keys: rename it."
        )
    broken = [key for key, value in vectors.items() if not value.is_meta and not torch.isfinite(value).all()]
    if broken:
        raise VectorError(
            f"The steering vector of adapter {adapter_name!r} holds NaN or infinity at {broken}, expected finite "
            "values; nothing was saved. Its weights never arrived, or training diverged."
        )
    return {key: value.float() for key, value in vectors.items()}


def vectors_to_load(
    model: nn.Module, adapter_name: str, saved: Mapping[str, torch.Tensor], without_name: Callable[[str], str]
) -> dict[str, torch.Tensor]:
    """The tensors of a file by their keys in the model, after checking that they belong there.

    Args:
        model: carries the adapter already.
        adapter_name: which.
        saved: the tensors of the file.
        without_name: a key of the model as it is saved.

    Raises:
        VectorError: a foreign key, another shape, other layers, values that are not finite.
    """
    suffix = _suffix(adapter_name)
    model_keys = {_with_prefix(without_name(key)): key for key in model.state_dict() if key.endswith(suffix)}
    source = f"adapter {adapter_name!r}"
    saved = without_embeddings(saved, source)
    tensors = {_with_prefix(checkpoint_key(key)): value for key, value in saved.items()}
    if len(tensors) < len(saved):
        raise VectorError(f"{source}: received two vectors for the same place in {sorted(saved)}.")
    check_tensors(tensors, _layers(model, adapter_name)[0].hidden_size, len(model_keys), source)
    renamed = match_by_layer(model_keys.keys() - tensors.keys(), tensors.keys() - model_keys.keys())
    tensors = {renamed.get(key, key): value for key, value in tensors.items()}
    if tensors.keys() != model_keys.keys():
        raise VectorError(
            f"{source}: received vectors for {sorted(tensors)}, expected {sorted(model_keys)}. The adapter was made "
            "for a model with other decoder layers."
        )
    return {model_keys[key]: value for key, value in tensors.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from the processes that hold parts of it, in all of them; any other as it is."""
    # Known by an attribute each: torch's class for sharded tensors and DeepSpeed take long to import.
    if hasattr(tensor, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _suffix(adapter_name: str) -> str:
    return f".steering.steer_vector.{adapter_name}"


def _layers(model: nn.Module, adapter_name: str) -> list[SteerLayer]:
    return [m for m in model.modules() if isinstance(m, SteerLayer) and adapter_name in m.steer_vector]


def _with_prefix(key: str) -> str:
    return key if key.startswith(PREFIX) else f"{PREFIX}{key}"
