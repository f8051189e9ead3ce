"""What the configs of a model say about the shape of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn


# What configs call the width of the hidden states, and the number of layers of a stack.
WIDTHS = ("hidden_size", "d_model", "embed_dim", "dim")
LENGTHS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers", "depth")
# What they call the number of residual streams that run side by side, where layers return four dimensions.
STREAMS = ("altup_num_inputs", "hc_mult")


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder, or `None` for a model without a transformers config."""
    config: Any = getattr(model, "config", None)
    # Not `get_text_config(decoder=True)`: on flat encoder-decoder configs that rewrites a copy and drops names.
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return config
    return config.get_text_config()


def shape_at(model: nn.Module, path: str) -> tuple[Any, int | None]:
    """The innermost config around the block at `path`, and the width that it gives to the block's hidden states.

    Of several widths it is the one that most weights of the block have (a vision tower's `hidden_size` may be that of
    its output); without any that some weight has, the answer is `(None, None)`.
    """
    sizes = _sizes(model.get_submodule(path))
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):
        for config in with_parts(getattr(model.get_submodule(".".join(parts[:depth])), "config", None)):
            fitting = [width for width in widths(config) if width in sizes or not sizes]
            if fitting:
                return config, max(fitting, key=sizes.__getitem__)
    return None, None


def widths(config: Any) -> list[int]:
    """What a config may call the width of the hidden states."""
    return [width for key in WIDTHS if isinstance(width := getattr(config, key, None), int)]


def lengths(config: Any) -> set[int]:
    """The numbers of layers that a config speaks of: of a flat encoder-decoder config, those of both stacks."""
    values = (getattr(config, key, None) for key in LENGTHS)
    return {value for value in values if isinstance(value, int)}


def streams(config: Any) -> dict[str, int]:
    """What a config says about residual streams side by side, `{}` if there is one as usual."""
    return {key: getattr(config, key) for key in STREAMS if getattr(config, key, None)}


def with_parts(config: Any) -> Iterator[Any]:
    """A config and those within it, e.g. of the encoder and the decoder."""
    if config is not None:
        yield config
    for part in getattr(config, "__dict__", {}).values():
        if hasattr(part, "model_type"):
            yield from with_parts(part)


def _sizes(block: nn.Module) -> Counter[int]:
    sizes = Counter(size for parameter in block.parameters() for size in parameter.shape)
    # Quantized weights are packed, but their modules still say how wide they are.
    sizes.update(module.in_features for module in block.modules() if isinstance(module, nn.Linear))
    return sizes
