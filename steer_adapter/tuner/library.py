"""A library of vectors: thousands of them in one tensor, outside PEFT's books, chosen row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from steer_adapter.decoder import Decoder, find_decoder
from steer_adapter.errors import AdapterNameError, ModelError

from .config import SteerConfig
from .layer import SteerLayer, steer_layers
from .positions import note_ranks
from .targets import decoder_of


if TYPE_CHECKING:
    from .request import Request

InScope = Callable[[torch.Tensor, str], torch.Tensor]


class Library:
    """Named vectors for one shape of model, in one tensor.

    Made by [`~steer_adapter.load_library`]. `attach` puts it on a model, and `steering(model, adapter_names=[...])`
    picks from it, a vector for each row. Nothing is added to `peft_config`, and choosing costs the same whatever the
    number of vectors.

    Attributes:
        table: `[V, H]` float32, all vectors of all layers.
        names: the N names, in order.
        layers: the decoder layers that any of them steers.
        hidden_size: H.
        num_hidden_layers: of the models that the vectors are for.
    """

    def __init__(self, configs: dict[str, SteerConfig], vectors: dict[str, dict[int, torch.Tensor]]) -> None:
        shapes = {(config.hidden_size, config.num_hidden_layers): name for name, config in configs.items()}
        if len(shapes) > 1:
            raise ModelError(
                f"The vectors are for models of different shapes: (hidden_size, num_hidden_layers) is {shapes}; "
                "expected one shape. Load each kind from a folder of its own."
            )
        ((self.hidden_size, self.num_hidden_layers),) = shapes
        self.names = tuple(configs)
        self.index = {name: number for number, name in enumerate(self.names)}
        self.layers = sorted({layer for by_layer in vectors.values() for layer in by_layer})
        self.multipliers = torch.tensor([config.multiplier for config in configs.values()])
        self.scopes = tuple(config.token_scope for config in configs.values())
        # Row of the table by layer and name, -1 where a vector does not steer the layer.
        self.rows = {layer: torch.full((len(self.names),), -1) for layer in self.layers}
        tensors: list[torch.Tensor] = []
        for number, name in enumerate(self.names):
            for layer, vector in vectors[name].items():
                self.rows[layer][number] = len(tensors)
                tensors.append(vector.float())
        self.table = torch.stack(tensors)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.index

    def __getitem__(self, name: str) -> dict[int, torch.Tensor]:
        """The vector of a name, `[H]` float32, by layer."""
        number = self.index[name]
        return {layer: self.table[rows[number]] for layer, rows in self.rows.items() if rows[number] >= 0}

    def attach(self, model: nn.Module) -> None:
        """Put the library on a model, so that `steering(model, adapter_names=[...])` can pick from it.

        Nothing is steered outside such a block. Names of adapters and those of the library must differ.

        Args:
            model: a transformers model or a PeftModel, with vectors or without.

        Raises:
            ModelError: the model has another shape, or carries a library.
            AdapterNameError: an adapter has a name that is in the library too.
        """
        decoder = find_decoder(model)
        self._check_model(model, decoder)
        modules = dict(model.named_modules())
        for layer in self.layers:
            target = modules[decoder.names[layer]]
            if getattr(target, "steering", None) is None:
                SteerLayer(decoder.hidden_size).attach(target)
            target.steering.set_library(LibraryLayer(self, layer))
        if set(self.scopes) != {"all"}:
            note_ranks(modules[decoder_of(decoder.names[0])])

    def detach(self, model: nn.Module) -> None:
        """Take the library off again, and leave adapters alone."""
        for module in list(model.modules()):
            steering = module._modules.get("steering")
            if isinstance(steering, SteerLayer) and steering.library is not None and steering.library.library is self:
                steering.set_library(None)
                if not steering.steer_vector:
                    steering.detach(module)

    def _check_model(self, model: nn.Module, decoder: Decoder) -> None:
        if (decoder.hidden_size, len(decoder)) != (self.hidden_size, self.num_hidden_layers):
            raise ModelError(
                f"The library is for models with hidden_size={self.hidden_size} and "
                f"num_hidden_layers={self.num_hidden_layers}, but {type(model).__name__} has {decoder.hidden_size} "
                f"and {len(decoder)}."
            )
        existing = steer_layers(model)
        if any(layer.library is not None for layer in existing):
            raise ModelError("The model carries a library already. Take that one off first: library.detach(model).")
        taken = sorted({name for layer in existing for name in layer.steer_vector if name in self})
        if taken:
            raise AdapterNameError(f"The model has adapters named {taken}, which are names in the library too.")


class LibraryLayer:
    """The vectors of a library at one decoder layer."""

    def __init__(self, library: Library, layer: int) -> None:
        self.library, self.layer = library, layer
        self.scopes = set(library.scopes)

    def __contains__(self, name: object) -> bool:
        return name in self.library

    def pick(self, request: Request, rows: int, device: torch.device, in_scope: InScope) -> torch.Tensor:
        """m·v of the vector that each row names, 0 for a row that names none of these.

        Args:
            request: names the rows.
            rows: B, of the model.
            device: of the result.
            in_scope: multiplier `[B]` and token scope to `[B, 1, 1]` or `[B, T, 1]`.

        Returns:
            `[B, 1, H]` float32, or `[B, T, H]` if some vectors steer only some tokens.
        """
        picked = request.once((self, device), lambda: self._picked(request).to(device))
        picked = request.by_model_row(picked, rows)[:, None, :]
        if self.scopes == {"all"}:
            return picked
        scopes = [self.library.scopes[self.library.index[n]] if n in self else "all" for n in request.names or ()]
        masks = [(scope, torch.tensor([float(scope == s) for s in scopes], device=device)) for scope in set(scopes)]
        return picked * sum(in_scope(request.by_model_row(mask, rows), scope) for scope, mask in masks)

    def _picked(self, request: Request) -> torch.Tensor:
        """m·v by row of the caller, `[B, H]`."""
        library, names = self.library, request.names or ()
        numbers = torch.tensor([library.index.get(name, 0) for name in names])
        rows = library.rows[self.layer][numbers]
        here = (rows >= 0) & torch.tensor([name in library for name in names])
        strengths = [
            request.value(name, row, library.multipliers[number])
            for row, (name, number) in enumerate(zip(names, numbers, strict=True))
        ]
        return library.table[rows.clamp(min=0)] * (torch.stack(strengths) * here)[:, None]
