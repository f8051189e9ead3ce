"""The module that holds the vectors of one decoder layer, and the hook that calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from steer_adapter.errors import ModelError, VectorError
from steer_adapter.operations import OPERATIONS

from .asked import Asked, ask
from .compiled import register, traced
from .config import SteerConfig
from .folding import Fold, apply_fold, folded_bias, undo_fold
from .places import Place
from .positions import current_ranks, is_packed
from .recompute import Latest, Recompute, in_backward, layer_input_of
from .request import request_for


if TYPE_CHECKING:
    from .library import LibraryLayer


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
    other_param_names = ("multipliers", "operations", "scopes")

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = self.in_features = self.out_features = hidden_size
        # The only component of any key that may begin with `steer_`: transformers finds the adapter's name by it.
        self.steer_vector = nn.ParameterDict()
        self.multipliers = BufferDict(persistent=False)
        self.operations: dict[str, str] = {}
        self.scopes: dict[str, str] = {}
        # A block of no transformers model may know no tokens, and return `[B, H]`.
        self.is_custom = False
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._known_finite: dict[str, tuple[torch.Tensor, int]] = {}
        self._fold: Fold | None = None
        self._recompute = Recompute()
        self.library: LibraryLayer | None = None
        # Whether any vector steers the prompt or the completion only.
        self.is_scoped = False
        self.compiled_multipliers = Latest()
        self.key = register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.key = register(self)

    def attach(self, decoder_layer: nn.Module) -> None:
        """Put this module on a decoder layer."""
        from .others import spare_vectors

        spare_vectors()
        global _version
        _version += 1
        decoder_layer.add_module("steering", self)
        # First in line: hooks that record hidden states must see the steered ones.
        self._hook = decoder_layer.register_forward_hook(steer_output, prepend=True, with_kwargs=True)

    def detach(self, decoder_layer: nn.Module) -> None:
        """Take this module and its hook off again."""
        global _version
        _version += 1
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
        self.scopes[adapter_name] = config.token_scope
        self.is_custom = config.model_type is None
        self._look_for_scopes()

    def set_library(self, library: LibraryLayer | None) -> None:
        """Let rows pick from the vectors of a library at this layer; `None` takes it off."""
        self.library = library
        self._look_for_scopes()

    def _look_for_scopes(self) -> None:
        library = () if self.library is None else self.library.scopes
        self.is_scoped = any(scope != "all" for scope in (*self.scopes.values(), *library))

    def set_multiplier(self, adapter_name: str, value: float) -> None:
        """Set the live strength of one vector. In place, so that compiled code sees it."""
        self.multipliers[adapter_name].fill_(value)
        if adapter_name in self.merged_adapters and self.place is not None:
            self.fold(self.place, self.merged_adapters)

    def forward(self, hidden_states: torch.Tensor, layer_input: torch.Tensor | None = None) -> torch.Tensor:
        """Steer `[B, T, H]`; the same shape and dtype come out. `layer_input` is what the decoder layer got."""
        if hidden_states.ndim == 2 and self.is_custom:
            return self.forward(hidden_states[:, None], layer_input)[:, 0]
        self._check_hidden_states(hidden_states)
        with self.at_hand():
            return self._steered(hidden_states, self._asked(hidden_states, layer_input))

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Bring in vectors that accelerate keeps elsewhere: it would for a forward of theirs, and they have none."""
        hooked = [module for module in (self.steer_vector, self.multipliers) if "_hf_hook" in vars(module)]
        for module in hooked:
            module._hf_hook.pre_forward(module)
        try:
            yield
        finally:
            for module in hooked:
                module._hf_hook.post_forward(module, None)

    def _steered(self, hidden_states: torch.Tensor, asked: Asked) -> torch.Tensor:
        for operation, apply in OPERATIONS.items():
            names = [name for name in asked.multipliers if self.operations[name] == operation]
            vectors = [self.checked_vector(name).to(hidden_states.device) for name in names]
            multipliers = [asked.multipliers[name].to(hidden_states.device) for name in names]
            if vectors:
                hidden_states = apply(hidden_states, vectors, multipliers)
        if asked.picked is not None:  # of operation `add`; a row that names one of these names no other, so it adds 0
            hidden_states = hidden_states + asked.picked.to(hidden_states.dtype)
        return hidden_states

    def _asked(self, hidden_states: torch.Tensor, layer_input: torch.Tensor | None) -> Asked:
        if torch.compiler.is_compiling():
            return traced(self, hidden_states)
        if layer_input is None or not (layer_input.requires_grad or torch.is_grad_enabled()):
            return self._ask(hidden_states)
        if in_backward() and (recalled := self._recompute.recall(layer_input)) is not None:
            return recalled
        asked = self._ask(hidden_states).copied()
        self._recompute.keep(layer_input, asked)
        return asked

    def _ask(self, hidden_states: torch.Tensor) -> Asked:
        rows, tokens, _ = hidden_states.shape
        return ask(self, rows, hidden_states.device, current_ranks(tokens) if self.is_scoped else None)

    def _check_hidden_states(self, hidden_states: torch.Tensor) -> None:
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ModelError(
                f"A decoder layer returned hidden states of shape {list(hidden_states.shape)}, expected "
                f"[batch, tokens, {self.hidden_size}]. This architecture's layers can't be steered."
            )

    def checked_vector(self, name: str) -> torch.Tensor:
        """The vector, refused if it is not finite; looked at once for each version of the parameter."""
        vector = self.steer_vector[name]
        if vector.is_meta:
            raise VectorError(
                f"The steering vector of adapter {name!r} is on the meta device: its weights never arrived. That "
                "happens where model.load_adapter() meets a model that is offloaded already. Load the adapter with "
                "PeftModel.from_pretrained(model, ...), or before offloading."
            )
        if torch.compiler.is_compiling():
            return vector  # looked at when the compiled code runs, by `compiled`
        version = 0 if vector.is_inference() else vector._version
        known, known_version = self._known_finite.get(name, (None, -1))
        if known is not vector or known_version != version:
            if not torch.isfinite(vector.detach()).all():  # nothing for autograd to save
                raise VectorError(
                    f"The steering vector of adapter {name!r} holds NaN or infinity, expected finite values. Either "
                    "its weights never arrived (a file without them, or keys of another model), or training "
                    "diverged. Load the adapter again and look at the warnings (where a model names its layers "
                    "otherwise, only PeftModel.from_pretrained finds them), or train with a lower learning rate."
                )
            self._known_finite[name] = (vector, version)
        return vector

    def delete_adapter(self, adapter_name: str) -> None:
        self._known_finite.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        self._look_for_scopes()

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


# Goes up when a SteerLayer is put somewhere or taken off.
_version = 0
_found: WeakKeyDictionary[nn.Module, tuple[int, tuple[SteerLayer, ...]]] = WeakKeyDictionary()


def steer_layers(model: nn.Module) -> tuple[SteerLayer, ...]:
    """The SteerLayers of a model. Remembered: walking through a large model takes longer than choosing its vectors."""
    version, layers = _found.get(model, (-1, ()))
    if version != _version or not layers:
        layers = tuple(module for module in model.modules() if isinstance(module, SteerLayer))
        _found[model] = (_version, layers)
    return layers


def check_rows(layer: SteerLayer, kwargs: dict[str, Any]) -> None:
    """Refuse to tell rows apart where a row holds several sequences."""
    request = request_for(layer)
    if request is not None and (request.by_row or layer.is_scoped) and is_packed(kwargs):
        raise ModelError(
            "steering: received values or prompt lengths for rows, but the rows hold several sequences (packing, or "
            "continuous batching); expected one sequence in each row. Use one multiplier for all, or don't pack."
        )


def steer_output(decoder_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a decoder layer: steer its hidden states and leave the rest of its output alone."""
    steering, layer_input = decoder_layer.steering, layer_input_of(args, kwargs)
    if not torch.compiler.is_compiling():
        check_rows(steering, kwargs)
    if isinstance(output, torch.Tensor):
        return steering(output, layer_input)
    if type(output) in (tuple, list) and output and isinstance(output[0], torch.Tensor):
        return type(output)([steering(output[0], layer_input), *output[1:]])
    raise ModelError(
        f"{type(decoder_layer).__name__} returned {type(output).__name__}, expected a tensor, or a tuple or list that "
        "starts with one. This architecture's layers can't be steered."
    )
