"""Our head against TRL's, which is the reference for everything that DPOTrainer computes and logs."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, HIDDEN, make_model
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig
from trl.trainer.utils import add_fused_lm_head

from steer_adapter.learn.head import completion_fields, install


OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
SCALED = {
    "gemma2": Gemma2Config(
        vocab_size=96, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0,
    ),
    "granite": GraniteConfig(
        vocab_size=96, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=3.0,
    ),
}  # fmt: skip


def model_of(name: str) -> torch.nn.Module:
    if name in ARCHITECTURES:
        return make_model(name)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SCALED[name]).eval()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SCALED])
def test_the_fields_and_the_gradient_are_those_of_trl(name):
    ids = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9)[None] < torch.tensor([[4], [5], [3], [6]]), -100)
    labels[1, 7:] = -100
    results = []
    for ours in (False, True):
        model = model_of(name)
        add_fused_lm_head(model, outputs=OUTPUTS)
        if ours:
            theirs = model.forward
            install(model, OUTPUTS)
            assert model.forward is not theirs
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        output = model(inputs_embeds=embeddings, labels=labels, fused_lm_head=True)
        output.log_probs.sum().backward()
        results.append((output, embeddings.grad))
    (wanted, wanted_grad), (received, grad) = results
    for field in OUTPUTS:
        assert torch.allclose(getattr(received, field).float(), getattr(wanted, field).float(), atol=1e-4), field
    assert torch.allclose(grad, wanted_grad, atol=1e-4) and grad.abs().max() > 0


def test_without_the_flag_the_forward_is_the_models_own():
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    wanted = model(ids, labels=ids)
    add_fused_lm_head(model, outputs=OUTPUTS)
    install(model, OUTPUTS)
    received = model(ids, labels=ids)
    assert torch.equal(received.logits, wanted.logits) and torch.equal(received.loss, wanted.loss)
    assert torch.equal(model.generate(ids, max_new_tokens=3), make_model().generate(ids, max_new_tokens=3))


def test_a_statistic_that_it_does_not_have_stays_with_trl():
    model = make_model()
    add_fused_lm_head(model, outputs=("log_probs", "log_sum_sq_probs"))
    theirs = model.forward
    install(model, ("log_probs", "log_sum_sq_probs"))
    assert model.forward is theirs


def test_no_gradient_through_the_statistics():
    logits = torch.randn(1, 2, 7, requires_grad=True)
    fields = completion_fields(logits, torch.tensor([[-100, -100, 3, 4]]), first=2)
    assert fields["log_probs"].shape == (1, 4) and fields["log_probs"][0, :2].tolist() == [0.0, 0.0]
    assert fields["log_probs"].requires_grad and not fields["entropy"].requires_grad
