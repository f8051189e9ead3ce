"""The head against TRL's, which is the reference for everything that DPOTrainer computes and logs."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, HIDDEN, make_model
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, OPTConfig

from steer_adapter.learn import head as module
from steer_adapter.learn.head import completion_fields, find_backbone, logits_fields, replaced_forward, run_backbone


COMMON = dict(vocab_size=96, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4)
SCALED = {
    "gemma2": Gemma2Config(
        **COMMON, intermediate_size=48, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0
    ),
    "granite": GraniteConfig(**COMMON, intermediate_size=48, num_key_value_heads=2, logits_scaling=3.0),
    "opt": OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=16),
}


def model_of(name: str) -> torch.nn.Module:
    if name in ARCHITECTURES:
        return make_model(name)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SCALED[name]).eval()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SCALED])
def test_the_head_is_the_architectures_own(name):
    model, ids = model_of(name), torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    backbone = find_backbone(model)
    with torch.no_grad():
        states, head = run_backbone(model, backbone, {"input_ids": ids})
        assert torch.allclose(head(states.flatten(0, 1)), model(ids).logits.flatten(0, 1), atol=1e-5)
    assert "forward" not in backbone.__dict__


@pytest.mark.parametrize("cap", [torch.tanh, lambda x: 2 * torch.tanh(x), lambda x: x, lambda x: 3 * x], ids=range(4))
def test_fields_and_gradient_written_out(monkeypatch, cap):
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    torch.manual_seed(0)
    weight, targets = torch.randn(11, 4, dtype=torch.float64), torch.tensor([3, 0, 10, 3, 5])
    states = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    fields = completion_fields(lambda h: cap(h @ weight.T), states, targets)
    logits = cap(states @ weight.T)
    logs = logits.log_softmax(-1)
    wanted = {
        "log_probs": logs[range(5), targets],
        "entropy": -(logs.exp() * logs).sum(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }
    for name, value in wanted.items():
        assert torch.allclose(fields[name].double(), value.double(), atol=1e-5), name
    weights = torch.tensor([1.0, -2, 0.5, 3, 1])
    (fields["log_probs"] * weights).sum().backward()
    received, states.grad = states.grad, None
    (logs[range(5), targets] * weights).sum().backward()
    assert torch.allclose(received, states.grad, atol=1e-5)
    assert not fields["entropy"].requires_grad and not fields["is_top1"].requires_grad


@pytest.mark.parametrize(("cap", "copies"), [(torch.tanh, 2), (lambda x: 3 * x, 1), (lambda x: x, 1)], ids=range(3))
def test_logits_are_held_once_unless_the_head_needs_them(monkeypatch, cap, copies):
    seen = []

    def fields(logits, targets, slope):
        seen.extend({logits.data_ptr(), slope.data_ptr()})
        return logits_fields(logits, targets, slope)

    monkeypatch.setattr(module, "logits_fields", fields)
    states, weight = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4)
    completion_fields(lambda h: cap(h @ weight.T), states, torch.tensor([3, 0, 10, 3, 5]))
    assert len(seen) == copies


def test_states_that_are_the_logits_stay_as_they_are():
    states = torch.randn(5, 4, requires_grad=True)
    before = states.detach().clone()
    completion_fields(lambda h: h, states, torch.tensor([3, 0, 1, 3, 2]))
    assert torch.equal(states, before)


def test_logits_stay_as_they_are_without_a_gradient():
    logits = torch.randn(3, 7)
    before = logits.clone()
    logits_fields(logits, torch.tensor([1, 2, 3]))
    assert torch.equal(logits, before)


def test_a_forward_is_put_back_after_an_error():
    model = make_model()
    with pytest.raises(KeyError), replaced_forward(model.model, lambda: None):
        assert "forward" in model.model.__dict__
        raise KeyError
    assert "forward" not in model.model.__dict__


@pytest.mark.parametrize(("in_chunks", "calls"), [(True, [2, 2, 1]), (False, [5])])
def test_how_often_the_head_is_called(monkeypatch, in_chunks, calls):
    monkeypatch.setattr(module, "CHUNK", 2)
    weight, seen = torch.randn(11, 4), []

    def head(states):
        seen.append(len(states))
        return states @ weight.T

    states = torch.randn(5, 4, requires_grad=True)
    completion_fields(head, states, torch.tensor([3, 0, 10, 3, 5]), in_chunks)["log_probs"].sum().backward()
    assert seen == calls and states.grad.norm() > 0
