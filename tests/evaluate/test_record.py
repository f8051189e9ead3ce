from __future__ import annotations

import torch

from steer_adapter import SteerConfig
from steer_adapter.evaluate.record import record_sweep
from steer_adapter.evaluate.sweep import Sweep


def test_margins_join_what_is_known():
    config = SteerConfig(provenance={"seed": 3})
    zero = torch.tensor([1.0, 2.0, 3.0, 4.0])
    record_sweep(config, Sweep({-1.0: zero - 1, 0.0: zero, 0.5: zero + torch.tensor([1.0, 1.0, -2.0, 4.0])}))
    assert config.provenance == {
        "seed": 3,
        "margins": {"-1": {"margin": -1.0, "right_way": 1.0}, "0.5": {"margin": 1.0, "right_way": 0.75}},
    }
