"""Proof that steering happens: one short forward, and a word on every active vector."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steer_adapter.errors import ModelError
from steer_adapter.tuner import SteerLayer
from steer_adapter.tuner.state_dict import whole


@dataclass(frozen=True)
class Arrival:
    """What became of one active vector at one layer.

    Attributes:
        adapter: name of the adapter.
        layer: path of the decoder layer.
        multiplier: its live multiplier.
        norm: |v|.
        dose: the relative dose |m·v| / mean|h| at this layer on the probe, or NaN if the layer was not reached.
        arrives: whether the layer's output was steered by it.
        reason: why not, or an empty string.
    """

    adapter: str
    layer: str
    multiplier: float
    norm: float
    dose: float
    arrives: bool
    reason: str


@dataclass(frozen=True)
class Verification:
    """The result of [`verify`]; true in a condition if there are active vectors and all of them arrive."""

    arrivals: tuple[Arrival, ...]

    def __bool__(self) -> bool:
        return bool(self.arrivals) and all(arrival.arrives for arrival in self.arrivals)

    def __str__(self) -> str:
        if not self.arrivals:
            return "No steering vector is active."
        return "\n".join(
            f"{a.adapter} at {a.layer}: multiplier {a.multiplier:g}, |v| {a.norm:.4g}, dose {a.dose:.3g}: "
            + ("arrives" if a.arrives else f"DOES NOT ARRIVE ({a.reason})")
            for a in self.arrivals
        )


def verify(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Verification:
    """Run one short forward and say whether every active vector really arrives.

    Args:
        model: anything that carries vectors: a PeftModel, or a transformers model with adapters.
        inputs: what to run it on; by default eight token ids. A model that takes no token ids needs them.

    Returns:
        [`Verification`]: true if all is well; printed, a line for each vector.

    Raises:
        ModelError: the model carries no steering vectors at all, or needs `inputs`.
    """
    layers = {name.rpartition(".")[0]: m for name, m in model.named_modules() if isinstance(m, SteerLayer)}
    if not layers:
        raise ModelError(f"{type(model).__name__} carries no steering vectors, expected at least one to verify.")
    finite = True
    for layer in layers.values():
        with layer.at_hand():
            finite = finite and all(torch.isfinite(v).all() for v in layer.steer_vector.values())
    seen = _probe(model, layers, inputs or _probe_inputs(model)) if finite else {}
    return Verification(
        tuple(
            _arrival(adapter, name, layer, seen.get(name), finite)
            for name, layer in layers.items()
            for adapter in layer.active_adapters
            if adapter in layer.steer_vector
        )
    )


def _arrival(
    adapter: str, name: str, layer: SteerLayer, seen: tuple[torch.Tensor, torch.Tensor] | None, finite: bool
) -> Arrival:
    with layer.at_hand():
        vector, multiplier = whole(layer.steer_vector[adapter]).detach(), layer.multipliers[adapter]
    dose = float("nan")
    if seen is not None:
        dose = float((multiplier * vector).norm() / seen[0].float().norm(dim=-1).mean())
    if not torch.isfinite(vector).all():
        reason = "the vector is not finite: its weights never arrived"
    elif not finite:
        reason = "not tried, another vector is not finite"
    elif layer.disable_adapters:
        reason = "adapters are disabled"
    elif not vector.any() or not multiplier:
        reason = "the vector or its multiplier is zero"
    elif seen is None:
        reason = "the model did not run this layer's steering"
    elif adapter in layer.merged_adapters:
        reason = ""  # it was in the output already, by way of a bias, when that entered the steering
    elif torch.equal(*seen):
        reason = "the layer's output did not change; the dose may be below the precision of its dtype"
    else:
        reason = ""
    return Arrival(adapter, name, float(multiplier), float(vector.norm()), dose, not reason, reason)


def _probe(
    model: nn.Module, layers: dict[str, SteerLayer], inputs: Mapping[str, Any]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By decoder layer: the hidden states that entered its steering, and those that left the layer after all hooks."""
    entered: dict[str, torch.Tensor] = {}
    left: dict[str, torch.Tensor] = {}
    # Module by module: the wrapper of a model in eval mode may well be in training mode.
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack, torch.no_grad():
        for name, steering in layers.items():
            stack.enter_context(_Hook(steering, name, entered, inputs=True))
            stack.enter_context(_Hook(model.get_submodule(name), name, left, inputs=False))
        model.eval()
        try:
            model(**inputs)
        finally:
            for module, mode in modes:
                module.training = mode
    return {name: (entered[name], left[name]) for name in entered.keys() & left.keys()}


class _Hook:
    """A forward hook that records one tensor, and is gone when the block ends."""

    def __init__(self, module: nn.Module, name: str, record: dict[str, torch.Tensor], inputs: bool) -> None:
        self.module, self.name, self.record, self.inputs = module, name, record, inputs

    def __enter__(self) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            value = args if self.inputs else output
            self.record[self.name] = value[0] if isinstance(value, (tuple, list)) else value

        self.handle = self.module.register_forward_hook(hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _probe_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    embedding = _token_embedding(model)
    if embedding is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ModelError(
            f"{type(model).__name__} takes no token ids: pass verify(model, inputs={{...}}) to run it on."
        )
    # What is offloaded is on the meta device between forwards, and its hooks move the inputs.
    ids = torch.arange(1, 9, device="cpu" if embedding.is_meta else embedding.device)[None] % embedding.shape[0]
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _token_embedding(model: nn.Module) -> torch.Tensor | None:
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return weight if isinstance(weight, torch.Tensor) else None
