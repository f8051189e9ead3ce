from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_model

from steer_adapter.log_probs import completion_log_probs, first_prediction, token_log_probs


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(0))
    attention, completion = torch.ones_like(ids), torch.zeros_like(ids)
    for row, (start, end) in enumerate([(4, 9), (3, 7), (5, 8), (4, 6)]):
        completion[row, start:end] = 1
        attention[row, end:] = 0
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


def by_hand(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    sums = []
    for row in range(len(inputs["input_ids"])):
        length = int(inputs["attention_mask"][row].sum())
        ids = inputs["input_ids"][row, :length]
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double().numpy()
        log_p = logits - logits.max(-1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        sums.append(sum(log_p[t - 1, int(ids[t])] for t in range(1, length) if inputs["completion_mask"][row, t]))
    return np.array(sums)


@pytest.mark.parametrize("skips", [True, False])
def test_sums_against_numpy(skips, monkeypatch):
    monkeypatch.setattr("steer_adapter.log_probs.takes_logits_to_keep", lambda model: skips)
    model = make_model()
    received = completion_log_probs(model, batch())
    assert received.dtype == torch.float32
    assert np.abs(received.numpy() - by_hand(model, batch())).max() <= 1e-4


def test_the_first_column_that_predicts():
    assert first_prediction(torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool()) == 2


def test_bfloat16_logits_are_normalized_in_float32():
    logits = torch.randn(3, 50).bfloat16()
    wanted = logits.double().log_softmax(-1)[torch.arange(3), [1, 2, 3]]
    assert torch.allclose(token_log_probs(logits, torch.tensor([1, 2, 3])).double(), wanted, atol=1e-5)
