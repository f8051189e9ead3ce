"""Where a decoder layer adds a bias to the residual stream last: found by structure, proven by short forwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steer_adapter.errors import ModelError
from steer_adapter.shapes import text_config

from .proof import Place, Probe


# Entries of configs that give projections a bias, and do nothing else as long as the biases are zero.
FLAGS = ("mlp_bias", "use_bias", "bias", "enable_bias", "attention_bias")


def find_places(model: nn.Module, targets: Sequence[str]) -> dict[str, Place]:
    """Find a place in each of the decoder layers `targets`, and prove it by forwards of a few tokens.

    The model is as it was afterwards, whatever happens.

    Args:
        model: a transformers model; its projections may be wrapped by other adapters.
        targets: paths of decoder layers, all of one stack.

    Raises:
        ModelError: a layer has no such place, is offloaded, or the model can't be run on token ids.
    """
    path = targets[0].rpartition(".")[0]
    stack = model.get_submodule(path)
    layers = {f"{path}.{name}": module for name, module in stack._modules.items() if module is not None}
    if any(parameter.is_meta for parameter in stack.parameters()):
        raise ModelError(
            "Folding: some decoder layers are offloaded, expected all in memory; nothing was changed. Load the model "
            "without offloading, or keep the adapter."
        )
    config = text_config(model)
    probe = Probe(_owner(model, path), layers)
    for flag in (None, *(name for name in FLAGS if getattr(config, name, None) is False)):
        created = set(biases_switched_on_by(model, flag)) if flag else set()
        candidates = {name: _candidates(model, name, layers[name], created, flag) for name in targets}
        if all(candidates.values()):
            places = probe.first_that_hold(candidates)
            if len(places) == len(targets):
                return places
    raise ModelError(
        f"Folding: received {type(model).__name__} ({getattr(config, 'model_type', None)}) with vectors at "
        f"{list(targets)}, expected in each of these layers a projection or norm whose bias is added last to the "
        "residual stream, with no norm or gate after it, and that the model's config provides for. There is none, so "
        "stock transformers could not reload the result; nothing was changed. Keep the adapter: it costs one addition "
        "a layer, is saved with save_pretrained() and loaded with PeftModel.from_pretrained()."
    )


def _owner(model: nn.Module, path: str) -> nn.Module:
    """The innermost module around a stack that takes token ids."""
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        if hasattr(owner, "get_input_embeddings"):
            break
    return owner


def place_of(target: nn.Module) -> Place | None:
    """The place of a steered module that is itself a linear layer or a layer norm with a bias, or `None`."""
    if type(target) not in (nn.Linear, Conv1D, nn.LayerNorm) or target.bias is None or target.bias.is_meta:
        return None
    return Place(target, None, 1.0, target.bias.dtype)


def complete(model: nn.Module, flag: str) -> None:
    """Change the config so that transformers creates the biases of `flag`, and give the model those that it lacks.

    They are zero. The config is replaced by a changed copy: another model may share the old one.
    """
    shapes = biases_switched_on_by(model, flag)
    copies: dict[int, Any] = {}
    _changed_config(model, flag, copies)
    for module in model.modules():
        old = vars(module).get("config")
        if old is not None and id(old) in copies:
            module.config = copies[id(old)]
    for name, size in shapes.items():
        projection = _unwrapped(model, name)
        if projection.bias is None:
            zero = torch.zeros(size, dtype=_bias_dtype(projection, model), device=projection.weight.device)
            projection.bias = nn.Parameter(zero, requires_grad=False)


def biases_switched_on_by(model: nn.Module, flag: str) -> dict[str, int]:
    """Size, by name of projection, of the biases that `flag` adds to the model; empty if it changes anything else."""
    if not isinstance(model, PreTrainedModel):
        return {}
    try:
        before, modules_before = _skeleton(type(model), copy.deepcopy(model.config))
        after, modules_after = _skeleton(type(model), _changed_config(model, flag, {}))
    except Exception:  # custom code that can't be built this way: what the flag does remains unknown
        return {}
    new = after.keys() - before.keys()
    only_biases = all(name.endswith(".bias") and len(after[name]) == 1 for name in new)
    same = modules_before == modules_after and all(after.get(name) == shape for name, shape in before.items())
    if not (same and only_biases):
        return {}
    return {name.removesuffix(".bias"): after[name][0] for name in sorted(new)}


def _changed_config(model: nn.Module, flag: str, copies: dict[int, Any]) -> Any:
    """A copy of the model's config with the flag set; `copies` holds each part of it by the id of the original."""
    changed = copy.deepcopy(model.config, copies)
    setattr(copies[id(text_config(model))], flag, True)
    return changed


def _skeleton(model_class: type[nn.Module], config: Any) -> tuple[dict[str, torch.Size], dict[str, type]]:
    """Shapes of all tensors and types of all modules of a model that transformers would make; no memory is used."""
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return shapes, {name: type(module) for name, module in model.named_modules()}


def _candidates(
    model: nn.Module, layer_name: str, layer: nn.Module, created: set[str], flag: str | None
) -> list[Place]:
    """Projections and norms of a layer that have a bias or get one, the last first."""
    config = text_config(model)
    scale = float(getattr(config, "residual_multiplier", None) or 1.0)
    return [
        Place(projection, flag if projection.bias is None else None, scale, _bias_dtype(projection, model))
        for path, projection in reversed(list(_projections(layer, config.hidden_size)))
        if projection.bias is not None or f"{layer_name}.{path}" in created
    ]


def _projections(module: nn.Module, size: int, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Projections to `size` and norms of it, without the adapters around them.

    None of those that are several in a list: experts, heads.
    """
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, AuxiliaryTrainingWrapper)):
        return
    if isinstance(module, BaseTunerLayer):
        if not hasattr(module, "base_layer"):
            return
        module = module.get_base_layer()
    if _width(module) == size:
        yield path, module
    for name, child in module.named_children():
        yield from _projections(child, size, f"{path}.{name}" if path else name)


def _width(module: nn.Module) -> int | None:
    """What a projection, or a norm that knows a bias, gives out, or `None` for any other module."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return module.out_features if isinstance(module, nn.Linear) else module.nf
    weight = module._parameters.get("weight")
    return len(weight) if weight is not None and weight.ndim == 1 and "bias" in module._parameters else None


def _unwrapped(model: nn.Module, path: str) -> nn.Module:
    """A submodule by its path in the bare transformers model."""
    module = model
    for name in path.split("."):
        module = getattr(module, name)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
    return module


def _bias_dtype(projection: nn.Module, model: nn.Module) -> torch.dtype:
    """The weight's, or for quantized weights the model's."""
    for tensor in (projection.bias, projection.weight):
        if tensor is not None and tensor.is_floating_point():
            return tensor.dtype
    return model.dtype
