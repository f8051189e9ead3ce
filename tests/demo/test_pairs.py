from __future__ import annotations

from collections import Counter

import pytest

from steer_adapter.data import check_pairs
from steer_adapter.demo import pairs
from steer_adapter.demo.command import QUESTIONS


TRAIN, TEST = pairs.load("train").to_list(), pairs.load("test").to_list()


def test_there_are_enough_and_each_can_be_trained_on():
    assert len(TRAIN) >= 200 and len(TEST) >= 40
    check_pairs(TRAIN)
    check_pairs(TEST)


def test_the_split_is_clean():
    prompts = [row["prompt"] for row in TRAIN + TEST]
    assert len(set(prompts)) == len(prompts)
    assert set(QUESTIONS) <= {row["prompt"] for row in TEST}, "the demo asks held-out questions"


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_words_are_varied(side):
    openings = Counter(row[side].split()[0] for row in TRAIN + TEST)
    assert openings.most_common(1)[0][1] <= 0.05 * len(TRAIN + TEST)


def test_neither_side_is_told_by_its_length():
    differences = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in TRAIN + TEST]
    assert max(map(abs, differences)) <= 5 and abs(sum(differences)) / len(differences) < 1
