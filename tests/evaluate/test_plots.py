from __future__ import annotations

import pytest
import torch

from steer_adapter.errors import MissingExtraError
from steer_adapter.evaluate.plots import plot_margins
from steer_adapter.evaluate.sweep import Sweep


SWEEP = Sweep({m: torch.randn(5) + m for m in (-1.0, 0.0, 1.0)})


def test_a_png_and_nothing_else(tmp_path):
    plot_margins({"one": SWEEP, "two": SWEEP}, tmp_path / "margins.png", "title")
    assert [p.name for p in tmp_path.iterdir()] == ["margins.png"]
    assert (tmp_path / "margins.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("steer_adapter.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'steer-adapter\[plot\]'"):
        plot_margins({"one": SWEEP}, tmp_path / "margins.png", "title")
