"""The proof that a bias of a decoder layer is added to the residual stream last: short forwards with it changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from steer_adapter.errors import ModelError


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


class Probe:
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
