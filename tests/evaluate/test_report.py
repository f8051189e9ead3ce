from __future__ import annotations

import torch

from steer_adapter.evaluate.report import answers_section, margins_table
from steer_adapter.evaluate.sweep import Sweep


def test_the_table():
    one = Sweep({-1.0: torch.tensor([-1.0, -2.0]), 0.0: torch.zeros(2), 1.0: torch.tensor([3.0, -1.0])})
    assert margins_table({"one": one}).splitlines() == [
        "| multiplier | one: margin | right way |",
        "|---|---|---|",
        "| -1 | -1.50 | 100% |",
        "| +0 | +0.00 |  |",
        "| +1 | +1.00 | 50% |",
    ]


def test_the_answers():
    section = answers_section({"How?": {-1.0: "Badly.\nIndeed.", 1.0: "Well!"}})
    assert section.splitlines() == ["**How?**", "", "- `-1` Badly. Indeed.", "- `+1` Well!"]
