"""The module that holds the vectors of one decoder layer, and the hook that calls it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from steer_adapter.errors import ModelError, VectorError
from steer_adapter.operations import OPERATIONS

from .config import SteerConfig
from .folding import Fold, apply_fold, folded_bias, undo_fold
from .places import Place


class SteerLayer(nn.Module, BaseTunerLayer):
    """
    The steering vectors of one decoder layer.

    It sits on the decoder layer as its child `steering` and wraps nothing: the decoder layer keeps its class, its name
    and its keys, so that other adapters still find what they target. A forward hook on the decoder layer passes the
    layer's output through it.

    Args:
        hidden_size (`int`): H, the width of the residual stream.
    """

    adapter_layer_names = ("steer_vector",)
    other_param_names = ("multipliers", "operations")

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        # The only component of any key that may begin with `steer_`: transformers finds the adapter's name by it.
        self.steer_vector = nn.ParameterDict()
        self.multipliers = BufferDict(persistent=False)
        self.operations: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._known_finite: dict[str, tuple[torch.Tensor, int]] = {}
        self._fold: Fold | None = None

    def attach(self, decoder_layer: nn.Module) -> None:
        """Put this module on a decoder layer."""
        decoder_layer.add_module("steering", self)
        # First in line: hooks that record hidden states must see the steered ones.
        self._hook = decoder_layer.register_forward_hook(steer_output, prepend=True)

    def detach(self, decoder_layer: nn.Module) -> None:
        """Take this module and its hook off again."""
        self._hook.remove()
        del decoder_layer.steering

    def update_layer(self, adapter_name: str, config: SteerConfig, device: torch.device) -> None:
        """Add a vector: NaN if one is about to be loaded, so that a vector that never arrives can't pass for one."""
        if config.is_saved:
            vector = torch.full((self.hidden_size,), float("nan"), dtype=torch.float32)
        elif config.init_weights:
            vector = torch.zeros(self.hidden_size, dtype=torch.float32)
        else:
            vector = torch.randn(self.hidden_size, dtype=torch.float32)
        self.steer_vector[adapter_name] = nn.Parameter(vector.to(device))
        self.multipliers[adapter_name] = torch.tensor(float(config.multiplier), dtype=torch.float32, device=device)
        self.operations[adapter_name] = config.operation

    def set_multiplier(self, adapter_name: str, value: float) -> None:
        """Set the live strength of one vector. In place, so that compiled code sees it."""
        self.multipliers[adapter_name].fill_(value)
        if adapter_name in self.merged_adapters and self.place is not None:
            self.fold(self.place, self.merged_adapters)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Steer `[B, T, H]`; the same shape and dtype come out."""
        active = [n for n in self.active_adapters if n in self.steer_vector and n not in self.merged_adapters]
        if self.disable_adapters or not active:
            return hidden_states
        self._check_hidden_states(hidden_states)
        for operation, apply in OPERATIONS.items():
            names = [name for name in active if self.operations[name] == operation]
            if names:
                vectors = [self._checked_vector(name).to(hidden_states.device) for name in names]
                multipliers = [self.multipliers[name].to(hidden_states.device) for name in names]
                hidden_states = apply(hidden_states, vectors, multipliers)
        return hidden_states

    def _check_hidden_states(self, hidden_states: torch.Tensor) -> None:
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ModelError(
                f"A decoder layer returned hidden states of shape {list(hidden_states.shape)}, expected "
                f"[batch, tokens, {self.hidden_size}]. This architecture's layers can't be steered."
            )

    def _checked_vector(self, name: str) -> torch.Tensor:
        """The vector, refused if it is not finite; looked at once for each version of the parameter."""
        vector = self.steer_vector[name]
        if torch.compiler.is_compiling():
            return vector
        version = 0 if vector.is_inference() else vector._version
        known, known_version = self._known_finite.get(name, (None, -1))
        if known is not vector or known_version != version:
            if not torch.isfinite(vector).all():
                raise VectorError(
                    f"The steering vector of adapter {name!r} holds NaN or infinity, expected finite values. Either "
                    "its weights never arrived (a file without them, or keys of another model), or training "
                    "diverged. Load the adapter again and look at the warnings, or train with a lower learning rate."
                )
            self._known_finite[name] = (vector, version)
        return vector

    def delete_adapter(self, adapter_name: str) -> None:
        self._known_finite.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        # Only the switch: PEFT's version would also make a vector that was loaded for inference trainable.
        self._disable_adapters = not enabled
        if not enabled:
            self.unfold()

    @property
    def place(self) -> Place | None:
        """Where the merged vectors are, or `None`."""
        return None if self._fold is None else self._fold.place

    def shift_of(self, names: list[str]) -> torch.Tensor:
        """`Σ mᵢ·vᵢ` of the named vectors, `[H]`, float32."""
        shifts = [self.multipliers[name] * self.steer_vector[name].detach().float() for name in names]
        return torch.stack(shifts).sum(dim=0)

    def fold(self, place: Place, names: list[str]) -> None:
        """Put these vectors, and no others, into a bias; the hook passes them by from now on."""
        self.unfold()
        self._fold = folded_bias(place, self.shift_of(names))
        apply_fold(self._fold)
        self.merged_adapters = list(names)

    def unfold(self) -> None:
        """Take the merged vectors out of the bias again; the hook adds them from now on."""
        if self._fold is not None:
            undo_fold(self._fold)
        self._fold = None
        self.merged_adapters = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: PEFT calls this on the layers of every tuner when another one (a LoRA) is merged. See `fold`."""

    def unmerge(self) -> None:
        """Nothing, as for `merge`. See `unfold`."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    @property
    def weight(self) -> torch.Tensor:
        # BaseTunerLayer would look for it on a base layer; there is none.
        raise AttributeError("A SteerLayer wraps no module and has no weight.")

    @property
    def bias(self) -> torch.Tensor:
        raise AttributeError("A SteerLayer wraps no module and has no bias.")

    def _apply(self, fn: Any, recurse: bool = True) -> SteerLayer:
        """Move, but never cast: at |v| = 0.5 a bfloat16 vector can't take a step of 5e-4."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, active={self.active_adapters}"


def steer_output(decoder_layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a decoder layer: steer its hidden states and leave the rest of its output alone."""
    steering = decoder_layer.steering
    if isinstance(output, torch.Tensor):
        return steering(output)
    if type(output) in (tuple, list) and output and isinstance(output[0], torch.Tensor):
        return type(output)([steering(output[0]), *output[1:]])
    raise ModelError(
        f"{type(decoder_layer).__name__} returned {type(output).__name__}, expected a tensor, or a tuple or list that "
        "starts with one. This architecture's layers can't be steered."
    )
