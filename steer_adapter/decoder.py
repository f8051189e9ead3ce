"""Where the decoder layers of a model are, found by structure rather than by a table of architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from steer_adapter.errors import ModelError
from steer_adapter.shapes import lengths, shape_at, streams


@dataclass(frozen=True)
class Decoder:
    """The stack of decoder layers whose outputs are the residual stream.

    Attributes:
        names: the path of each layer, relative to the model that was searched; layer L is `names[L]`.
        hidden_size: width of the residual stream.
        model_type: the `model_type` of the stack's own config, e.g. `"llama"`.
    """

    names: tuple[str, ...]
    hidden_size: int
    model_type: str | None

    def __len__(self) -> int:
        return len(self.names)


def find_decoder(model: nn.Module, stack: str | None = None) -> Decoder:
    """Find a stack of layers in `model`: the text decoder, or another if `stack` says so.

    It is an outermost `nn.ModuleList` of composite modules, below `model.get_decoder()` or below the module `stack`,
    that has as many entries as its config has layers. Of several it is the one with the most parameters.

    Args:
        model: a transformers model, wrapped or not.
        stack: path of the module that holds the stack, as in the unwrapped model, e.g. `"model.vision_tower"`.

    Raises:
        ModelError: there is no such stack or several alike, no config tells the hidden size, a layer is used twice, or
            the layers have several residual streams.
    """
    path = _decoder_path(model) if stack is None else _path_ending_in(stack, model)
    lists = _lists_of_blocks(model, path)
    if not lists:
        raise ModelError(
            f"No decoder layers were found in {_describe(model)}{f' below {path!r}' if path else ''}: expected an "
            "nn.ModuleList of blocks. Name the blocks yourself: SteerConfig(target_modules=[...], hidden_size=...)."
        )
    configs = {name: shape_at(model, f"{name}.0") for name in lists}
    name = _choose(model, lists, {name: None if stack else config for name, (config, _) in configs.items()})
    config, hidden_size = configs[name]
    if hidden_size is None:
        raise ModelError(
            f"{_describe(model)} has no config with a `hidden_size` that fits {name}, so the width of its residual "
            "stream is unknown. Expected a transformers model. For a custom model pass "
            "SteerConfig(target_modules=[names of its blocks], hidden_size=their output width)."
        )
    _check_layers(model, name, lists[name], config)
    names = tuple(f"{name}.{index}" for index in range(len(lists[name])))
    return Decoder(names, hidden_size, getattr(config, "model_type", None))


def _decoder_path(model: nn.Module) -> str:
    """Follow `get_decoder()` for as long as it leads to something with lists of blocks."""
    paths = {module: name for name, module in model.named_modules()}
    root = model
    while callable(getattr(root, "get_decoder", None)):
        inner: Any = root.get_decoder()
        is_deeper = len(paths.get(inner, "")) > len(paths[root])
        if not is_deeper or not _lists_of_blocks(model, paths[inner]):
            break
        root = inner
    return paths[root]


def _path_ending_in(stack: str, model: nn.Module) -> str:
    """The outermost module of that path; wrappers around the model put names before it."""
    paths = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{stack}")]
    depth = min((name.count(".") for name in paths), default=0)
    outermost = [name for name in paths if name.count(".") == depth]
    if len(outermost) != 1:
        raise ModelError(
            f"`stack`: received {stack!r}, which names {outermost or 'no module'} in {_describe(model)}. Expected the "
            "path of one module, as in model.named_modules()."
        )
    return outermost[0]


def _lists_of_blocks(model: nn.Module, path: str) -> dict[str, nn.ModuleList]:
    """Outermost lists of blocks below `path`; a list inside a block (experts, heads) is not a stack of layers."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        is_below = not path or f"{name}.".startswith(f"{path}.")
        if is_below and _is_list_of_blocks(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _is_list_of_blocks(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 0 and all(any(m.children()) for m in module)


def _choose(model: nn.Module, lists: dict[str, nn.ModuleList], configs: dict[str, Any]) -> str:
    """The path of the largest list that is as long as its config says; those of the text config go first."""
    config = getattr(model, "config", None)
    text_type = getattr(getattr(config, "text_config", config), "model_type", None)
    found = {name: len(blocks) for name, blocks in lists.items()}
    fitting = [name for name in found if found[name] in (lengths(configs[name]) or {found[name]})]
    fitting = [name for name in fitting if getattr(configs[name], "model_type", None) == text_type] or fitting
    sizes = {name: sum(p.numel() for p in lists[name].parameters()) for name in fitting}
    best = max(sizes, key=sizes.__getitem__, default="")

    def is_like_best(name: str) -> bool:
        # Of one module's lists of the same length each holds a piece of every layer.
        is_piece = name.rpartition(".")[0] == best.rpartition(".")[0] and found[name] == found[best]
        return is_piece or sizes[name] == sizes[best]

    if sum(map(is_like_best, sizes)) == 1:
        return best
    raise ModelError(
        f"{_describe(model)} has the lists of blocks {found}, expected one that is its decoder: "
        f"{'several fit' if sizes else 'none is as long as its config says'}. If one of them gives out the residual "
        "stream, choose it with SteerConfig(stack=its path)."
    )


def _check_layers(model: nn.Module, name: str, layers: nn.ModuleList, config: Any) -> None:
    if len(set(layers)) != len(layers):
        raise ModelError(
            f"{_describe(model)}: the {len(layers)} layers of {name!r} are only {len(set(layers))} modules, expected "
            "each to be one of its own. A vector on a shared layer acts wherever it runs: if that is wanted, name it "
            "with SteerConfig(target_modules=[...])."
        )
    if streams(config):
        raise ModelError(
            f"{_describe(model)}: the layers of {name!r} carry several residual streams side by side, says the "
            f"config ({streams(config)}); expected one, [batch, tokens, hidden_size]. They can't be steered."
        )


def _describe(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", None)
    return f"{type(model).__name__} ({name})" if name else type(model).__name__
