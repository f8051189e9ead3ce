"""What a steering vector does to the residual stream: pure functions on hidden states.

Shapes: `B` rows, `T` tokens, `H` the hidden size. An operation takes the hidden states `[B, T, H]`, the active vectors
and their multipliers, float32 and broadcastable against them, and returns hidden states of the same shape
and dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch


Operation = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]


def add(
    hidden_states: torch.Tensor, vectors: Sequence[torch.Tensor], multipliers: Sequence[torch.Tensor]
) -> torch.Tensor:
    """`h + Σ mᵢ·vᵢ` at every position (CAA, arXiv 2312.06681; BiPO, arXiv 2406.00045, equation 2).

    The sum is taken in float32 and cast once to the dtype of `h`, so that two vectors lose no more than one does.

    Args:
        hidden_states: `[B, T, H]`, any floating dtype.
        vectors: tensors of shape `[H]`, or `[B, 1, H]` for one per row, float32.
        multipliers: as many, float32: scalars, `[B, 1, 1]` for one per row, `[B, T, 1]` for one per token.

    Returns:
        `[B, T, H]`, in the dtype of `hidden_states`.
    """
    products = [multiplier * vector.float() for vector, multiplier in zip(vectors, multipliers, strict=True)]
    return hidden_states + reduce(torch.add, products).to(hidden_states.dtype)


# An adapter names its operation in `SteerConfig.operation`; one entry here is all that a new one needs.
OPERATIONS: dict[str, Operation] = {"add": add}
