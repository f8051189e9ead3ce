"""Ways to make one vector of several: pure functions on the vectors of one layer.

Each takes the vectors (`[H]`, float32) with their weights and returns `[H]`, float32. The methods that are known from
merging LoRAs are PEFT's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft.utils import merge_utils


def linear(vectors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Σ wᵢ·vᵢ."""
    return torch.stack([weight * vector for weight, vector in zip(weights, vectors, strict=True)]).sum(dim=0)


def mean(vectors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The plain mean, as in ensembles of steering vectors (SVE, arXiv 2503.05371); the weights are not used."""
    return torch.stack(list(vectors)).mean(dim=0)


def orthogonal(vectors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Σ wᵢ·(vᵢ − its projection on the span of the other vectors): what the vectors share is removed before adding.

    Symmetric: the order of the vectors does not matter. A vector that lies in the span of the others adds nothing.
    """
    own = []
    for index, vector in enumerate(vectors):
        others = torch.stack([other for j, other in enumerate(vectors) if j != index] or [torch.zeros_like(vector)])
        # An orthonormal basis of the others' span, without the directions that are only rounding.
        _, singular, basis = torch.linalg.svd(others.double(), full_matrices=False)
        basis = basis[singular > singular.max() * others.shape[1] * torch.finfo(torch.float32).eps]
        own.append((vector.double() - basis.T @ (basis @ vector.double())).to(vector.dtype))
    return linear(own, weights)


Combination = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]

COMBINATIONS: dict[str, Combination] = {"linear": linear, "mean": mean, "orthogonal": orthogonal}
# PEFT's, which keep a share of the entries (`density`); two of them draw it at random.
SPARSE_COMBINATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}
SIGN_COMBINATIONS = ("ties", "dare_ties")
