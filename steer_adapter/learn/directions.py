"""The mathematics of steering in both directions at once, without a model.

With d = −1 the objective of BiPO (arXiv 2406.00045, equation 3) is the one of d = +1 with chosen and rejected
exchanged and the multiplier negated:

    −log σ(d·β·Δ(chosen; h + d·v) − d·β·Δ(rejected; h + d·v)),  Δ(r; h') = log π(r | q; h') − log π(r | q; h)

so any loss on preference pairs can be used as it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch


DIRECTIONS = {1: "positive", -1: "negative"}


def draw_direction(seed: int, step: int) -> int:
    """d ∈ {−1, +1} with equal probability, a function of seed and optimizer step alone.

    No state: all processes and all micro-batches of a step agree, and a resumed run draws what the first would have.
    """
    return random.Random(f"{seed}:{step}").choice((-1, 1))


def exchange(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Exchange chosen and rejected in a batch of TRL's preference collator.

    Args:
        batch: tensors whose first dimension is `2B`, chosen in the first half, rejected in the second; and columns
            whose names say `chosen` or `rejected`, of size `B`.
    """
    exchanged = {}
    for key, value in batch.items():
        if "chosen" in key or "rejected" in key:
            exchanged[_other(key)] = value
        else:
            first, second = value.chunk(2, dim=0)
            exchanged[key] = torch.cat([second, first], dim=0)
    return exchanged


def exchange_metrics(metrics: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Give back to chosen and rejected what was measured while they were exchanged.

    Margins (chosen − rejected) change their sign and accuracies (chosen > rejected) become their complement. The token
    accuracy is left out: it was measured on the rejected side only.
    """
    restored = {}
    for key, values in metrics.items():
        if key == "mean_token_accuracy":
            continue
        if key.endswith("margins"):
            restored[key] = [-value for value in values]
        elif key.endswith("accuracies"):
            restored[key] = [1 - value for value in values]
        else:
            restored[_other(key)] = list(values)
    return restored


def _other(key: str) -> str:
    if "chosen" in key:
        return key.replace("chosen", "rejected")
    return key.replace("rejected", "chosen")


def auto_learning_rate(scale: float, hidden_size: int, steps: int) -> float:
    """A learning rate for AdamW that suits a run of any length on a model of any width.

    AdamW moves each coordinate by about the learning rate a step, whatever the gradient. What a vector needs is a
    certain dose: a norm relative to that of the residual stream. So the rate is proportional to the norm a coordinate
    has there, `scale / √hidden_size`, and falls with the square root of the number of steps.

    Args:
        scale: median norm of the hidden states at the steered layer (the mean is spoilt by attention sinks).
        hidden_size: H.
        steps: number of optimizer steps of the run.
    """
    return AUTO_RATE * scale / math.sqrt(hidden_size * max(steps, 1))


AUTO_RATE = 0.06
