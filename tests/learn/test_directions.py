from __future__ import annotations

import math

import pytest
import torch

from steer_adapter.learn.directions import auto_learning_rate, draw_direction, exchange, exchange_metrics


def test_a_direction_is_a_function_of_seed_and_step():
    first, again = ([draw_direction(7, step) for step in range(50)] for _ in range(2))
    assert first == again
    assert first != [draw_direction(8, step) for step in range(50)]


def test_both_directions_come_equally_often():
    draws = [draw_direction(seed, step) for seed in range(5) for step in range(2000)]
    assert set(draws) == {-1, 1}
    assert abs(sum(draws)) < 4 * math.sqrt(len(draws)), "four standard deviations"


def test_directions_that_everyone_draws():
    """A change here changes every vector that anyone reproduces from a seed."""
    assert [draw_direction(42, step) for step in range(10)] == DRAWN_AT_42


DRAWN_AT_42 = [-1, -1, 1, -1, 1, 1, 1, 1, 1, 1]


def test_exchange():
    batch = {
        "input_ids": torch.tensor([[1], [2], [3], [4]]),
        "completion_mask": torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1]]),
        "ref_chosen_logps": torch.tensor([-1.0, -2.0]),
        "ref_rejected_logps": torch.tensor([-3.0, -4.0]),
    }
    exchanged = exchange(batch)
    assert exchanged["input_ids"].tolist() == [[3], [4], [1], [2]]
    assert exchanged["completion_mask"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert exchanged["ref_chosen_logps"].tolist() == [-3.0, -4.0]
    assert exchanged["ref_rejected_logps"].tolist() == [-1.0, -2.0]
    twice = exchange(exchanged)
    assert all(torch.equal(twice[key], batch[key]) for key in batch)


def test_metrics_are_given_back():
    restored = exchange_metrics(
        {
            "rewards/chosen": [0.5],
            "rewards/rejected": [-0.25],
            "rewards/margins": [0.75],
            "rewards/accuracies": [0.875],
            "logps/chosen": [-9.0],
            "entropy": [2.0],
            "mean_token_accuracy": [0.5],
        }
    )
    assert restored == {
        "rewards/rejected": [0.5],
        "rewards/chosen": [-0.25],
        "rewards/margins": [-0.75],
        "rewards/accuracies": [0.125],
        "logps/rejected": [-9.0],
        "entropy": [2.0],
    }


@pytest.mark.parametrize("hidden_size", [576, 8192])
def test_the_learning_rate_moves_a_vector_by_the_same_dose_at_any_width(hidden_size):
    per_coordinate = 7.0
    rate = auto_learning_rate(per_coordinate * math.sqrt(hidden_size), hidden_size, 100)
    assert rate == pytest.approx(auto_learning_rate(per_coordinate, 1, 100))
    assert auto_learning_rate(1.0, 1, 400) == pytest.approx(auto_learning_rate(1.0, 1, 100) / 2)
