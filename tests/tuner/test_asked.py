"""What a layer is asked for: live settings, requests, rows, merged and disabled vectors."""

from __future__ import annotations

import pytest
import torch

from steer_adapter import SteerConfig, SteerLayer
from steer_adapter.errors import ModelError
from steer_adapter.tuner.asked import Asked, ask
from steer_adapter.tuner.request import Request, requested


CPU = torch.device("cpu")


@pytest.fixture
def layer():
    layer = SteerLayer(4)
    for name, multiplier, scope in (("a", 2.0, "all"), ("b", -1.0, "all"), ("late", 0.5, "completion")):
        layer.update_layer(name, SteerConfig(multiplier=multiplier, token_scope=scope), CPU)
    layer.set_adapter(["a"])
    return layer


def values(asked):
    return {name: multiplier.flatten().tolist() for name, multiplier in asked.multipliers.items()}


def test_the_active_vectors_with_their_live_multipliers(layer):
    assert values(ask(layer, 3, CPU, None)) == {"a": [2.0]}
    layer.set_adapter(["a", "b"])
    assert values(ask(layer, 3, CPU, None)) == {"a": [2.0], "b": [-1.0]}


def test_none_if_disabled_or_merged(layer):
    layer.merged_adapters = ["a"]
    assert values(ask(layer, 3, CPU, None)) == {}
    layer.merged_adapters = []
    layer.enable_adapters(False)
    assert values(ask(layer, 3, CPU, None)) == {}


def test_requests(layer):
    def asked(rows=2, ranks=None, **request):
        with requested(Request(frozenset([layer]), **request)):
            return ask(layer, rows, CPU, ranks)

    assert values(asked(multiplier=5.0)) == {"a": [5.0]}
    assert asked(multiplier=torch.tensor([5.0, 6.0])).multipliers["a"].shape == (2, 1, 1)
    assert values(asked(multiplier={"b": 7.0})) == {"a": [2.0], "b": [7.0]}
    assert values(asked(names=("b", "__base__"))) == {"b": [-1.0, 0.0]}
    assert values(asked(names=("b", "a"), copies=2, rows=4)) == {"b": [-1, -1, 0, 0], "a": [0, 0, 2, 2]}
    ranks = torch.arange(3)[None]
    scoped = asked(names=("late", "a"), prompt_lengths=torch.tensor([2, 3]), ranks=ranks)
    assert scoped.multipliers["late"].squeeze(-1).tolist() == [[0.0, 0.5, 0.5], [0.0, 0.0, 0.0]]
    with pytest.raises(ModelError, match="without prompt lengths.*task_type='CAUSAL_LM'"):
        asked(names=("late", "a"), ranks=ranks)
    with pytest.raises(ModelError, match="without their decoder"):
        asked(names=("late", "a"), prompt_lengths=torch.tensor([2, 3]))
    with pytest.raises(ModelError, match="Length of `adapter_names` .* got 2 and 3 respectively"):
        asked(names=("late", "a"), rows=3)


def test_copies_and_comparison(layer):
    asked = ask(layer, 1, CPU, None)
    copy = asked.copied()
    assert asked.equals(copy)
    layer.set_multiplier("a", 9.0)
    assert values(asked) == {"a": [9.0]} and values(copy) == {"a": [2.0]} and not asked.equals(copy)
    picked = Asked({}, torch.ones(1, 1, 4))
    assert picked.equals(Asked({}, torch.ones(1, 1, 4))) and not picked.equals(Asked({}, torch.zeros(1, 1, 4)))
    assert not picked.equals(Asked({})) and not asked.equals(Asked({}))
