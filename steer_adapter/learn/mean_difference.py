"""Mean difference (CAA, arXiv 2312.06681, equation 1): the baseline that every learned vector is compared with.

v_L = mean over pairs of [mean over completion tokens of h_L(prompt + chosen) − the same of h_L(prompt + rejected)].
The authors take the one answer token of A/B questions; for free text this takes the mean over the completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from steer_adapter.errors import DataError
from steer_adapter.tuner import SteerLayer

from .processes import gathered


def completion_means(hidden_states: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Mean of hidden states over the completion tokens of each row, in float32.

    Args:
        hidden_states: `[B, T, H]`.
        completion_mask: `[B, T]`, 1 at completion tokens, at least one a row.

    Returns:
        `[B, H]`, float32.
    """
    weights = completion_mask.to(hidden_states.device, torch.float32)[..., None]
    return (hidden_states.float() * weights).sum(dim=1) / weights.sum(dim=1)


def fit_mean_difference(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default"
) -> dict[str, torch.Tensor]:
    """Fill an adapter with mean differences.

    Args:
        model: a PeftModel with a steering adapter; its vectors are off while it is read, and overwritten at the end.
        batches: as TRL's preference collator makes them: `input_ids`, `attention_mask` and `completion_mask`, each
            `[2B, T]`, chosen in the first half and rejected in the second.
        adapter_name: the adapter to fill.

    Returns:
        The vectors, float32 `[H]`, by path of the decoder layer.

    Raises:
        DataError: there are no pairs.
    """
    layers = {
        name.rpartition(".")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, SteerLayer) and adapter_name in module.steer_vector
    }
    sums = {name: torch.zeros(layer.hidden_size) for name, layer in layers.items()}
    count = 0
    with torch.no_grad(), model.disable_adapter():
        for batch in batches:
            for name, states in hidden_states(model, batch, layers).items():
                chosen, rejected = completion_means(states, batch["completion_mask"]).cpu().chunk(2)
                sums[name] += (chosen - rejected).sum(dim=0)
            count += len(batch["input_ids"]) // 2
    if count == 0:
        raise DataError("Mean difference: received no preference pairs, expected at least one.")
    vectors = {name: total / count for name, total in sums.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.steer_vector[adapter_name].copy_(vectors[name])
    return vectors


class _AllSeen(Exception):
    """Raised inside a forward, to leave it once everything wanted has been recorded."""


def hidden_states(
    model: nn.Module, batch: Mapping[str, Any], layers: Mapping[str, SteerLayer]
) -> dict[str, torch.Tensor]:
    """The residual stream `[B, T, H]` that enters the steering of each layer, by the given names.

    The forward ends at the last of the layers; nothing above them is computed.
    """
    seen: dict[str, torch.Tensor] = {}
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for name, layer in layers.items():

            def record(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                seen[name] = args[0]
                if len(seen) == len(layers):
                    raise _AllSeen

            stack.callback(layer.register_forward_pre_hook(record).remove)
        with gathered(model), suppress(_AllSeen):
            model(**{key: batch[key].to(device) for key in ("input_ids", "attention_mask")})
    return seen
