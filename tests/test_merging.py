from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from steer_adapter.merging import COMBINATIONS, SPARSE_COMBINATIONS, linear, mean, orthogonal


VECTORS = [torch.tensor(v) for v in ([3.0, 0.0, 4.0], [1.0, 2.0, 0.0], [0.0, -1.0, 1.0])]
WEIGHTS = torch.tensor([1.0, -0.5, 2.0])


def test_linear_and_mean_by_hand():
    assert linear(VECTORS, WEIGHTS).tolist() == [2.5, -3.0, 6.0]
    assert torch.allclose(mean(VECTORS, WEIGHTS), torch.tensor([4 / 3, 1 / 3, 5 / 3]))


def test_orthogonal_against_least_squares():
    vectors = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    wanted = np.zeros(12)
    for i, weight in enumerate(WEIGHTS.tolist()):
        others = np.delete(vectors.double().numpy(), i, axis=0).T
        coefficients, *_ = np.linalg.lstsq(others, vectors[i].double().numpy(), rcond=None)
        wanted += weight * (vectors[i].double().numpy() - others @ coefficients)
    assert np.abs(orthogonal(list(vectors), WEIGHTS).numpy() - wanted).max() <= 1e-6


def test_orthogonal_vectors_are_only_added():
    vectors = [torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])]
    assert torch.allclose(orthogonal(vectors, torch.ones(2)), torch.tensor([2.0, 3.0, 0.0]))


def test_what_is_shared_goes_and_a_zero_vector_takes_nothing():
    vectors = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])]
    assert torch.allclose(orthogonal(vectors, torch.ones(2)), torch.tensor([0.5, 0.5]))
    assert torch.equal(orthogonal([vectors[0], torch.zeros(2)], torch.ones(2)), vectors[0])
    assert torch.equal(orthogonal(vectors[:1], torch.tensor([3.0])), 3 * vectors[0])
    assert orthogonal([vectors[0], 2 * vectors[0]], torch.ones(2)).abs().max() <= 1e-6


@pytest.mark.parametrize("name", list(SPARSE_COMBINATIONS))
def test_the_others_are_pefts(name):
    assert SPARSE_COMBINATIONS[name] is getattr(merge_utils, name) and name not in COMBINATIONS
