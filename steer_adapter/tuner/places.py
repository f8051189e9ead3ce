"""Where a decoder layer adds a bias to the residual stream last: found by structure, proven by short forwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steer_adapter.errors import ModelError


# Entries of configs that give projections a bias, and do nothing else as long as the biases are zero.
FLAGS = ("mlp_bias", "use_bias", "bias", "enable_bias", "attention_bias")
PROBE_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Place:
    """A projection or norm whose bias b appears in the output of its decoder layer as `scale · b`, at every position.

    Attributes:
        projection: the module with the bias, without the adapters around it.
        flag: the entry of the text config that must become true for transformers to create the bias, or `None` if the
            model has it.
        scale: what the architecture multiplies the projection's output with before it is added.
        dtype: the dtype that a new bias gets.
    """

    projection: nn.Module
    flag: str | None
    scale: float
    dtype: torch.dtype


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
    config = _text_config(model)
    probe = _Probe(_owner(model, path), layers)
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


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return config
    return config.get_text_config()


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
    setattr(copies[id(_text_config(model))], flag, True)
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
    config = _text_config(model)
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


class _Probe:
    """Shows what a bias does to the output of its decoder layer.

    The model runs once as it is. It runs again with biases changed by random δ, where each decoder layer hands on what
    it returned in the first run: so all layers are looked at in one forward, each for itself.
    """

    def __init__(self, owner: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.owner, self.layers = owner, layers
        self.plain: dict[str, torch.Tensor] = {}

    def first_that_hold(self, candidates: Mapping[str, Sequence[Place]]) -> dict[str, Place]:
        """For each layer the first of its candidates that holds; layers without one are left out."""
        self.plain = self.plain or self._run()
        found: dict[str, Place] = {}
        for index in range(max(map(len, candidates.values()))):
            trial = {n: places[index] for n, places in candidates.items() if n not in found and index < len(places)}
            if trial:
                found |= {name: trial[name] for name in self._holding(trial)}
        # Together too: two layers might share one projection.
        return {name: found[name] for name in self._holding(found)}

    def _holding(self, places: Mapping[str, Place]) -> list[str]:
        if not places:
            return []
        generator = torch.Generator().manual_seed(0)
        deltas = {}
        for name in places:
            state = self.plain[name]
            size = state.float().norm(dim=-1).max() / state.shape[-1] ** 0.5
            # As large as the states themselves, so that their rounding doesn't hide it.
            deltas[name] = torch.randn(state.shape[-1], generator=generator).to(state.device) * size.clamp(min=1e-3)
        with ExitStack() as stack:
            for name, place in places.items():
                stack.enter_context(_nudged(place, deltas[name]))
            moved = self._run()
        others_stay = all(_moved_by(self.plain[n], moved[n], None) for n in self.layers if n not in places)
        return [n for n in places if others_stay and _moved_by(self.plain[n], moved[n], deltas[n])]

    def _run(self) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        training = [module for module in self.owner.modules() if module.training]
        with ExitStack() as stack, torch.no_grad():
            for name, layer in self.layers.items():
                stack.enter_context(_recorded(layer, name, seen, self.plain.get(name)))
            try:
                self.owner.eval()
                embedding = self.owner.get_input_embeddings().weight
                ids = (torch.arange(1, PROBE_TOKENS + 1) * 7 % embedding.shape[0])[None]
                self.owner(input_ids=ids.to("cpu" if embedding.is_meta else embedding.device), use_cache=False)
            except Exception as error:
                raise ModelError(
                    f"Folding: {type(self.owner).__name__} could not be run on token ids to prove where a vector "
                    f"belongs ({type(error).__name__}: {error}); nothing was changed. Keep the adapter."
                ) from error
            finally:
                for module in training:
                    module.training = True
        if seen.keys() != self.layers.keys() or any(state.ndim != 3 for state in seen.values()):
            raise ModelError(
                f"Folding: not every decoder layer of {type(self.owner).__name__} was run and returned states of "
                "shape [batch, tokens, hidden_size]; nothing was changed. Keep the adapter."
            )
        return seen


def _moved_by(before: torch.Tensor, after: torch.Tensor, delta: torch.Tensor | None) -> bool:
    """Whether every position of `[B, T, H]` moved by `delta` `[H]` (`None`: not at all), but for rounding."""
    moved = after.double() - before.double()
    if delta is None:
        return bool(moved.norm(dim=-1).max() <= 1e-4 * before.double().norm(dim=-1).max())
    tolerance = max(1e-4, 8 * torch.finfo(before.dtype).eps)
    return bool((moved - delta.double()).norm(dim=-1).max() <= tolerance * delta.double().norm())


@contextmanager
def _nudged(place: Place, delta: torch.Tensor) -> Iterator[None]:
    """The bias of a place changed so that its layer's output moves by `delta`, for a while."""
    projection, kept = place.projection, place.projection.bias
    try:
        start = 0.0 if kept is None else kept.detach().to(torch.promote_types(kept.dtype, torch.float32))
        nudged = (start + (delta / place.scale).to(projection.weight.device)).to(place.dtype)
        projection.bias = nn.Parameter(nudged, requires_grad=False)
        yield
    finally:
        projection.bias = kept


@contextmanager
def _recorded(
    layer: nn.Module, name: str, seen: dict[str, torch.Tensor], handed_on: torch.Tensor | None
) -> Iterator[None]:
    """Record what leaves a decoder layer, unsteered, and hand on something else if it is given."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        several = isinstance(output, (tuple, list))
        seen[name] = (output[0] if several else output).detach().clone()
        if handed_on is None:
            return None
        return type(output)([handed_on.clone(), *output[1:]]) if several else handed_on.clone()

    # Its switch alone: `enable_adapters` would unmerge.
    steering: Any = layer._modules.get("steering")
    disabled = steering._disable_adapters if isinstance(steering, BaseTunerLayer) else None
    handle = layer.register_forward_hook(hook, prepend=True)
    try:
        if disabled is not None:
            steering._disable_adapters = True
        yield
    finally:
        handle.remove()
        if disabled is not None:
            steering._disable_adapters = disabled
