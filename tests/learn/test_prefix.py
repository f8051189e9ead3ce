from __future__ import annotations

import pytest
import torch
from conftest import make_model
from peft import get_peft_model
from torch import nn

from steer_adapter import SteerConfig
from steer_adapter.learn.prefix import Prefix
from steer_adapter.learn.sharing import plain_layout


IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 1]])


def steered() -> tuple[nn.Module, Prefix, torch.Tensor]:
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=1))
    (vector,) = (p for n, p in model.named_parameters() if "steer_vector" in n)
    with torch.no_grad():
        vector.normal_()
    return model, Prefix(list(model.base_model.model.model.layers[:2])), vector


def test_recorded_states_replayed_give_the_same_logits_and_gradient():
    model, prefix, vector = steered()
    layout = plain_layout(IDS, torch.ones_like(IDS), IDS)
    with prefix.recording() as seen, torch.no_grad():
        model(IDS)
    tokens = layout.gather(seen[0])
    results = []
    for replayed in (False, True):
        vector.grad = None
        if replayed:
            with prefix.replaying(lambda: tokens):
                prefix.prepare(layout)
                model.base_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: pytest.fail("ran"))
                logits = model(IDS).logits[:, :-1]
        else:
            logits = model(IDS).logits[:, :-1]
        logits.square().sum().backward()
        results.append((logits.detach(), vector.grad.clone()))
    assert torch.equal(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1], rtol=1e-5)


def test_everything_is_put_back_after_an_error():
    model, prefix, _ = steered()
    wanted = model(IDS).logits
    with pytest.raises(KeyError), prefix.recording():
        raise KeyError
    with pytest.raises(KeyError), prefix.replaying(lambda: torch.zeros(6, 32)):
        assert prefix.replays
        raise KeyError
    assert not prefix.replays and all("forward" not in layer.__dict__ for layer in prefix.layers)
    assert torch.equal(model(IDS).logits, wanted)


def test_layers_that_return_tuples_keep_doing_so():
    class Layer(nn.Module):
        steering = nn.Identity()

        def forward(self, hidden_states):
            return hidden_states + 1, "weights"

    layers = [Layer(), Layer()]
    prefix = Prefix(layers)
    with prefix.recording():
        layers[1](layers[0](torch.zeros(1, 2, 3))[0])
    layout = plain_layout(IDS, torch.ones_like(IDS), IDS)
    with prefix.replaying(lambda: torch.ones(4, 3)):
        prefix.prepare(layout)
        handed = layers[0](torch.zeros(2, 4, 3))
        assert len(handed) == 2 and not handed[0].any()
        assert len(layers[1](handed[0])) == 2 and layers[1](handed[0])[0].sum() == 18
