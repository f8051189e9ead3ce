from __future__ import annotations

import pytest
import torch
from torch import nn

from steer_adapter.learn import tree_attention as module
from steer_adapter.learn.tree_attention import NAME, NotServed, TreeMasks, attending_within_trees, tree_attention


def masks() -> TreeMasks:
    generator = torch.Generator().manual_seed(0)
    return TreeMasks(torch.rand(n, n, generator=generator).gt(0.5) | torch.eye(n, dtype=torch.bool) for n in (5, 3))


def inputs(heads: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(1, heads, 8, 4, generator=torch.Generator().manual_seed(heads), dtype=dtype)


@pytest.mark.parametrize("small", [0, 256])
@pytest.mark.parametrize("heads", [2, 4])
def test_each_pair_by_itself(heads, small, monkeypatch):
    """Written out: softmax over the places that the mask shows, a row at a time, with its gradient."""
    monkeypatch.setattr(module, "SMALL", small)
    query, key, value = inputs(4).requires_grad_(), inputs(heads), inputs(heads) * 2
    given = masks()
    received, weights = tree_attention(nn.Module(), query, key, value, None, scaling=0.7, tree_masks=given)
    whole = torch.block_diag(*given).bool()
    rows = []
    for head in range(4):
        k, v = key[0, head * heads // 4], value[0, head * heads // 4]
        for place in range(8):
            scores = torch.stack([0.7 * query[0, head, place] @ k[j] for j in range(8) if whole[place, j]])
            rows.append(scores.softmax(0) @ v[whole[place]])
    wanted = torch.stack(rows).view(1, 4, 8, 4).transpose(1, 2)
    assert weights is None and torch.allclose(received, wanted, atol=1e-6) and given.used
    gradients = [torch.autograd.grad(result.square().sum(), query)[0] for result in (received, wanted)]
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("argument", [{"softcap": 30.0}, {"s_aux": torch.ones(4)}, {"position_bias": torch.ones(1)}])
def test_what_it_does_not_do_is_refused(argument):
    with pytest.raises(NotServed):
        tree_attention(nn.Module(), inputs(4), inputs(4), inputs(4), None, tree_masks=masks(), **argument)
    with pytest.raises(NotServed):
        tree_attention(nn.Module(), inputs(4), inputs(4), inputs(4), None)


def test_the_config_is_as_it_was():
    class Config:
        _attn_implementation = "sdpa"

    config = Config()
    with pytest.raises(KeyError), attending_within_trees(config):
        assert config._attn_implementation == NAME
        raise KeyError
    assert config._attn_implementation == "sdpa"
