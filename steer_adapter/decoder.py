"""Where the decoder layers of a model are, found by structure rather than by a table of architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from steer_adapter.errors import ModelError


@dataclass(frozen=True)
class Decoder:
    """The stack of decoder layers whose outputs are the residual stream.

    Attributes:
        names: the path of each layer, relative to the model that was searched; layer L is `names[L]`.
        hidden_size: width of the residual stream.
        model_type: the `model_type` of the text config, e.g. `"llama"`.
    """

    names: tuple[str, ...]
    hidden_size: int
    model_type: str | None

    def __len__(self) -> int:
        return len(self.names)


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder layers of `model`: the text decoder, where a model has several stacks.

    The stack is the outermost `nn.ModuleList` of composite modules inside `model.get_decoder()`. If there are several,
    it is the one that has as many entries as the config has layers, and of those the one with the most parameters.

    Raises:
        ModelError: there is no such stack, or no config tells the hidden size.
    """
    config = text_config(model)
    hidden_size = getattr(config, "hidden_size", None)
    if not isinstance(hidden_size, int):
        raise ModelError(
            f"{_describe(model)} has no config with a `hidden_size`, so the width of its residual stream is unknown. "
            "Expected a transformers model. For a custom model pass "
            "SteerConfig(target_modules=[names of its blocks], hidden_size=their output width)."
        )
    stacks = _stacks(_decoder_root(model))
    counts = {getattr(config, key, None) for key in ("num_decoder_layers", "decoder_layers", "num_hidden_layers")}
    stacks = [stack for stack in stacks if len(stack) in counts] or stacks
    if not stacks:
        raise ModelError(
            f"No decoder layers were found in {_describe(model)}: expected an nn.ModuleList of blocks below its "
            "decoder. Name the blocks yourself: SteerConfig(target_modules=[...])."
        )
    stack = max(stacks, key=lambda s: sum(p.numel() for p in s.parameters()))
    path = next(name for name, module in model.named_modules() if module is stack)
    return Decoder(
        names=tuple(f"{path}.{index}" if path else str(index) for index in range(len(stack))),
        hidden_size=hidden_size,
        model_type=getattr(config, "model_type", None),
    )


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder, or `None` for a model without a transformers config."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    # Not `get_text_config(decoder=True)`: on flat encoder-decoder configs that rewrites a copy and drops names.
    return config if getattr(config, "is_encoder_decoder", False) else config.get_text_config()


def _decoder_root(model: nn.Module) -> nn.Module:
    get_decoder = getattr(model, "get_decoder", None)
    root = get_decoder() if callable(get_decoder) else None
    return root if isinstance(root, nn.Module) else model


def _stacks(module: nn.Module) -> list[nn.ModuleList]:
    """Outermost lists of blocks; a list inside a block (experts, heads) is not a stack of decoder layers."""
    if isinstance(module, nn.ModuleList) and len(module) and all(any(True for _ in m.children()) for m in module):
        return [module]
    return [stack for child in module.children() for stack in _stacks(child)]


def _describe(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", None)
    return f"{type(model).__name__} ({name})" if name else type(model).__name__
