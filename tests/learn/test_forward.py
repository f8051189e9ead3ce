"""The forward of preference batches against TRL's, and when prompts are shared."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from test_architectures import DECODERS, make
from tiny_runs import varied
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig
from trl.trainer.utils import add_fused_lm_head

from steer_adapter.decoder import find_decoder
from steer_adapter.learn.forward import additive, cannot_share, install, random_parts, running_at, shortest_window
from steer_adapter.learn.tree_attention import NotServed


OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
OWN_ATTENTION = {"gptj", "gpt_neo", "falcon", "stablelm", "gemma2"}  # not through the interface, or more than a mask
TAKES_MORE = {"bloom", "mpt"}  # the feed-forward part gets the residual too
ALONE = {"bloom", "mpt", "mamba", "jamba"}


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 90, (n,), generator=generator) for n in (2, 1, 3)]
    ids, mask, labels = (torch.full((6, 9), value) for value in (0, 0, -100))
    for row, length in enumerate((9, 4, 5, 6, 7, 8)):
        prompt = prompts[row % 3]
        ids[row, :length] = torch.cat([prompt, torch.randint(3, 90, (length - len(prompt),), generator=generator)])
        mask[row, :length] = 1
        labels[row, len(prompt) : length] = ids[row, len(prompt) : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
# TRL leaves out the head that ModernBERT has before the projection to the vocabulary.
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "modernbert_decoder"])
def test_the_fields_are_those_of_trl(name, attention):
    model = varied(make(name)[0])
    if attention == "sdpa" and model.config._attn_implementation != "sdpa":
        pytest.skip("eager only")
    model.set_attn_implementation(attention)
    add_fused_lm_head(model, outputs=OUTPUTS)
    wanted = model(**batch(), use_cache=False, fused_lm_head=True)
    forward = install(model, OUTPUTS)
    texts = {key: value for key, value in batch().items() if key != "labels"}
    reason = forward.find_out_what_is_exact(model, texts)
    assert (reason is None) == forward.shares == (name not in ALONE)
    assert forward.by_pair == (name not in ALONE | OWN_ATTENTION)
    assert forward.narrows == (
        hasattr(model.get_submodule(find_decoder(model).names[-1]), "mlp") and name not in TAKES_MORE
    )
    narrows = forward.narrows
    for shares, by_pair in {(False, False), (forward.shares, False), (forward.shares, forward.by_pair)}:
        forward.shares, forward.by_pair, forward.narrows = shares, by_pair, narrows
        forward.window = 100 if shortest_window(model) > 8 else 4
        received = model(**batch(), use_cache=False, fused_lm_head=True)
        for field in OUTPUTS:
            assert torch.allclose(
                getattr(received, field).float(), getattr(wanted, field).float(), atol=2e-5, rtol=1e-5
            ), (field, shares, by_pair)


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
    assert install(model, ("log_probs", "log_sum_sq_probs")) is None and model.forward is theirs


def test_a_model_whose_numbers_are_others_does_not_share():
    """A layer that looks at its left neighbor, as a convolution does, sees a stranger where texts branch."""
    model = varied(make_model())
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: output + output.roll(1, dims=1))
    add_fused_lm_head(model, outputs=OUTPUTS)
    forward = install(model, OUTPUTS)
    texts = {key: value for key, value in batch().items() if key != "labels"}
    assert "numbers are others" in forward.find_out_what_is_exact(model, texts)
    assert not forward.shares and not forward.by_pair


def test_what_stands_against_sharing():
    assert cannot_share(make_model()) is None
    model = copy.deepcopy(make_model())
    model.config._attn_implementation = "flex_attention"
    assert "'flex_attention'" in cannot_share(model)
    assert shortest_window(make_model("gemma3")) == 4 and shortest_window(make_model()) == float("inf")


def test_random_parts():
    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    found = random_parts(AutoModelForCausalLM.from_config(config))
    assert "model.decoder.layers.0.dropout" in found, "a number, which DPOTrainer leaves on"
    assert random_parts(nn.Sequential(nn.Dropout(0.2))) == ["0.p"]
    assert all(random_parts(make_model(name)) == [] for name in ARCHITECTURES if name != "gpt2")


def test_an_additive_mask():
    mask = additive(torch.tensor([[True, False]]), torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and mask.tolist() == [[0.0, torch.finfo(torch.bfloat16).min]]


def test_a_module_that_runs_at_some_places():
    seen = []
    module = nn.Linear(4, 4, bias=False)
    module.register_forward_hook(lambda *_: None)
    own = module.forward
    module.forward = lambda states: seen.append(states.shape) or own(states)
    states = torch.randn(2, 3, 4)
    with running_at(module, torch.tensor([5, 1, 1])):
        received = module(states)
    wanted = torch.zeros(6, 4)
    wanted[[1, 5]] = own(states).flatten(0, 1)[[1, 5]].detach()
    assert seen == [(1, 2, 4)] and torch.allclose(received.flatten(0, 1), wanted)
    with pytest.raises(NotServed), running_at(module, torch.tensor([1])):
        module(states, 3)
