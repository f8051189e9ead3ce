from __future__ import annotations

import numpy as np
import pytest
import torch

from steer_adapter.operations import add


def scalars(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


def test_add_against_numpy():
    hidden, vectors = torch.randn(2, 3, 5), [torch.randn(5), torch.randn(5)]
    wanted = hidden.numpy() + np.float32(0.5) * vectors[0].numpy() - np.float32(2.0) * vectors[1].numpy()
    assert np.abs(add(hidden, vectors, scalars(0.5, -2.0)).numpy() - wanted).max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_cast_once_and_the_dtype_kept(dtype):
    hidden = torch.randn(1, 2, 4).to(dtype)
    # In bfloat16, 256 + 1 - 256 is 0: only a sum in float32 keeps the 1.
    vectors = [torch.full((4,), 256.0), torch.ones(4), torch.full((4,), -256.0)]
    received = add(hidden, vectors, scalars(1.0, 1.0, 1.0))
    assert received.dtype == dtype
    assert torch.equal(received, hidden + torch.ones((), dtype=dtype))


def test_the_dtype_is_kept_under_autocast():
    hidden = torch.randn(1, 2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert add(hidden, [torch.ones(4)], scalars(1.0)).dtype == torch.bfloat16
        assert add(hidden.float(), [torch.ones(4)], scalars(1.0)).dtype == torch.float32


def test_gradient_of_the_vector():
    vector = torch.zeros(4, requires_grad=True)
    add(torch.zeros(2, 3, 4), [vector], scalars(-1.5)).sum().backward()
    assert torch.equal(vector.grad, torch.full((4,), -1.5 * 6))


def test_multipliers_by_row_and_by_token_against_numpy():
    hidden, shared, own = torch.randn(2, 3, 5), torch.randn(5), torch.randn(2, 1, 5)
    by_row, by_token = torch.randn(2, 1, 1), torch.randn(2, 3, 1)
    received = add(hidden, [shared, own], [by_row, by_token])
    for row in range(2):
        for token in range(3):
            wanted = (
                hidden[row, token].numpy()
                + by_row[row, 0, 0].item() * shared.numpy()
                + by_token[row, token, 0].item() * own[row, 0].numpy()
            )
            assert np.abs(received[row, token].numpy() - wanted).max() <= 1e-5
