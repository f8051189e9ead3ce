from __future__ import annotations

import torch

from steer_adapter.learn.cache import Entry, StateCache
from steer_adapter.learn.shared_states import SharedStates


def test_closing_removes_what_is_not_kept(tmp_path):
    states = SharedStates([2, 3])
    entry = Entry(torch.ones(4, 8), torch.zeros(2, dtype=torch.float64))
    for depth, keeps in zip(states.depths, (True, False), strict=True):
        cache = states.caches[depth] = StateCache(tmp_path / str(depth), 0, tmp_path, keeps=keeps)
        cache.put(b"0" * 16, entry)
        cache.flush()
    states.close()
    assert not states.caches and (tmp_path / "2").exists() and not (tmp_path / "3").exists()
