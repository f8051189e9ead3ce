"""Vectors that steer only the prompt, or only the completion."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import HIDDEN, layers_of, make_model, random_vectors, set_vectors
from peft import get_peft_model
from transformers import BloomConfig, BloomForCausalLM

from steer_adapter import SteerConfig, steering
from steer_adapter.errors import ConfigError, ModelError
from steer_adapter.tuner.positions import scope_mask, token_ranks


LAYERS = [1, 2]
FAMILIES = ["llama", "gemma3", "gpt2", "gpt_neox"]
OPTIONS = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)


def steered(scope, family="llama", **kwargs):
    config = SteerConfig(layers_to_transform=LAYERS, token_scope=scope, multiplier=2.0, task_type="CAUSAL_LM")
    model = get_peft_model(make_model(family), config).eval()
    set_vectors(model, random_vectors(LAYERS))
    return model


def by_hand(family, scope, ids, prompt_length):
    """Logits of one row without padding: the vector is added to the positions of the scope."""
    model = make_model(family)
    steered_positions = range(prompt_length - 1) if scope == "prompt" else range(prompt_length - 1, ids.shape[1])
    mask = torch.zeros(1, ids.shape[1], 1)
    mask[:, list(steered_positions)] = 1.0
    handles = []
    for layer, vector in random_vectors(LAYERS).items():

        def add(_, args, output, delta=2.0 * vector * mask):
            return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

        handles.append(layers_of(model)[layer].register_forward_hook(add))
    with torch.no_grad():
        return model(ids).logits


def generate_by_hand(family, scope, prompt):
    ids = prompt
    for _ in range(OPTIONS["max_new_tokens"]):
        ids = torch.cat([ids, by_hand(family, scope, ids, prompt.shape[1])[:, -1:].argmax(-1)], dim=1)
    return ids[0, prompt.shape[1] :]


def left_padded(prompts):
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = [[5, 17, 33, 64, 8], [7, 40, 3, 29, 55, 71, 2, 9], [44]]


def test_the_mask():
    ranks = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]])
    lengths = torch.tensor([3, 2])
    completion = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]).float()
    assert torch.equal(scope_mask("completion", ranks, lengths), completion)
    assert torch.equal(scope_mask("prompt", ranks, lengths), 1 - completion)


def test_ranks():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    cpu = torch.device("cpu")
    assert token_ranks({"attention_mask": mask}, 5, cpu).tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert token_ranks({"attention_mask": mask}, 2, cpu).tolist() == [[1, 2], [2, 2]]
    assert token_ranks({}, 3, cpu).tolist() == [[0, 1, 2]]
    positions = {"attention_mask": mask[:, None, None], "position_ids": torch.tensor([[7, 8]])}
    assert token_ranks(positions, 2, cpu).tolist() == [[7, 8]]
    with pytest.raises(ModelError, match="can't be told apart"):
        token_ranks({"attention_mask": mask[:, None, None]}, 2, cpu)


def test_ranks_under_a_mask_for_all_places_of_a_static_cache():
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]])
    cache = SimpleNamespace(is_compileable=True, get_seq_length=lambda: 2)
    arguments = {"attention_mask": mask, "past_key_values": cache}
    assert token_ranks(arguments, 2, torch.device("cpu")).tolist() == [[1, 2], [2, 3]]


@pytest.mark.parametrize("scope", ["prompt", "completion"])
def test_a_static_cache_of_bloom(scope):
    torch.manual_seed(0)
    base = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=4, n_head=4))
    config = SteerConfig(layers_to_transform=[1], token_scope=scope, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base.eval(), config)
    arguments = dict(left_padded(PROMPTS), **OPTIONS, return_dict_in_generate=True, output_logits=True)
    wanted = model.generate(**arguments, use_cache=False).logits
    received = model.generate(**arguments, cache_implementation="static").logits
    with model.disable_adapter():
        plain = model.generate(**arguments, use_cache=False).logits
    assert (torch.stack(plain) - torch.stack(wanted)).abs().max() > 1e-3
    assert (torch.stack(received) - torch.stack(wanted)).abs().max() <= 1e-4


@pytest.mark.parametrize("scope", ["prompt", "completion"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_with_padding_on_either_side(family, scope):
    model = steered(scope, family)
    rows, lengths = [[5, 17, 33, 64, 8, 91], [7, 40, 3, 29]], [4, 2]
    right = torch.tensor([rows[0], rows[1] + [0, 0]])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    left = left_padded(rows)
    # GPT-2 and GPT-NeoX number positions by column unless told otherwise.
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), steering(model, prompt_lengths=lengths):
        right_logits = model(input_ids=right, attention_mask=mask).logits
        left_logits = model(**left, position_ids=positions).logits
    for row, ids in enumerate(rows):
        wanted = by_hand(family, scope, torch.tensor([ids]), lengths[row])[0]
        assert (right_logits[row, : len(ids)] - wanted).abs().max() <= 1e-5
        assert (left_logits[row, 6 - len(ids) :] - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("scope", ["prompt", "completion"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 2}], ids=str)
def test_generation_with_and_without_cache(family, scope, options):
    if "prefill_chunk_size" in options and family != "llama":
        pytest.skip("transformers' own limits")
    received = steered(scope, family).generate(
        **left_padded(PROMPTS), **OPTIONS, **options, return_dict_in_generate=True, output_logits=True
    )
    for row, prompt in enumerate(PROMPTS):
        prompt = torch.tensor([prompt])
        wanted = generate_by_hand(family, scope, prompt)
        assert torch.equal(received.sequences[row, -OPTIONS["max_new_tokens"] :], wanted)
        # Tokens may agree by chance, logits do not; the second token's have seen both scopes.
        ids = torch.cat([prompt, wanted[None, :1]], dim=1)
        by_the_hand = by_hand(family, scope, ids, prompt.shape[1])[0, -1]
        assert (received.logits[1][row] - by_the_hand).abs().max() <= 1e-4
        with torch.no_grad():
            is_plain = torch.equal(by_the_hand, make_model(family)(ids).logits[0, -1])
        assert is_plain == (scope == "prompt" and prompt.shape[1] == 1)


@pytest.mark.parametrize("scope", ["prompt", "completion"])
def test_beams_and_rows(scope):
    model = steered(scope)
    together = model.generate(
        **left_padded(PROMPTS), adapter_names=["default", "__base__", "default"], num_beams=3, **OPTIONS
    )
    for row, prompt in enumerate(PROMPTS):
        one = model if row != 1 else make_model()
        alone = one.generate(input_ids=torch.tensor([prompt]), num_beams=3, **OPTIONS)
        assert torch.equal(together[row, -6:], alone[0, -6:])
    plain = make_model().generate(**left_padded(PROMPTS), num_beams=3, **OPTIONS)
    assert not torch.equal(together[0], plain[0]) and torch.equal(together[1], plain[1])


@pytest.mark.parametrize("scope", ["prompt", "completion"])
def test_a_reused_cache_and_several_tokens_at_once(scope):
    model = steered(scope)
    ids = torch.tensor([[5, 17, 33, 64, 8, 91, 20]])
    wanted = by_hand("llama", scope, ids, 4)
    with torch.no_grad(), steering(model, prompt_lengths=[4]):
        first = model(ids[:, :2], use_cache=True)
        second = model(ids[:, 2:5], past_key_values=first.past_key_values, use_cache=True)
        third = model(ids[:, 5:], past_key_values=second.past_key_values)
    received = torch.cat([first.logits, second.logits, third.logits], dim=1)
    assert (received - wanted).abs().max() <= 1e-5


def test_assisted_decoding_gives_the_same():
    model = steered("completion")
    prompt = torch.tensor([PROMPTS[1]])
    received = model.generate(input_ids=prompt, prompt_lookup_num_tokens=3, **OPTIONS)
    assert torch.equal(received[0, -6:], generate_by_hand("llama", "completion", prompt))


def test_without_prompt_lengths_it_is_an_error():
    model = steered("prompt")
    with pytest.raises(ModelError, match="without prompt lengths"):
        model(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ModelError, match="without prompt lengths"):
        model.get_base_model().generate(torch.tensor([[5, 6, 7]]), **OPTIONS)
    padded = torch.tensor([[0, 0, 7]])
    model.generation_config.pad_token_id = 0
    with pytest.raises(ModelError, match="without prompt lengths"):
        model.generate(input_ids=padded, **OPTIONS)
    with steering(model, prompt_lengths=[3, 3]), pytest.raises(ModelError, match="values for 2 rows"):
        model(torch.tensor([[5, 6, 7]]))


def test_a_plain_transformers_model_takes_them_from_steering(tmp_path):
    steered("completion").save_pretrained(tmp_path)
    model = make_model()
    model.load_adapter(tmp_path)
    prompt = torch.tensor([PROMPTS[0]])
    with steering(model, prompt_lengths=[len(PROMPTS[0])]):
        received = model.generate(prompt, **OPTIONS)
    assert torch.equal(received[0, -6:], generate_by_hand("llama", "completion", prompt))


def test_the_scope_is_saved_and_checked(tmp_path):
    steered("prompt").save_pretrained(tmp_path)
    assert SteerConfig.from_pretrained(tmp_path).token_scope == "prompt"
    with pytest.raises(ConfigError, match="`token_scope`: received 'answer', expected one of"):
        SteerConfig(token_scope="answer")
    with pytest.raises(ConfigError, match="'prompt' with `target_modules`"):
        SteerConfig(token_scope="prompt", target_modules=["block"], hidden_size=HIDDEN)


def test_packed_rows_are_refused():
    model = steered("all")
    packed = dict(
        input_ids=torch.tensor([[5, 6, 7, 8, 9]]), position_ids=torch.tensor([[0, 1, 2, 0, 1]]), use_cache=False
    )
    with torch.no_grad(), steering(model, 2.0):
        model(**packed)
    for request in (dict(multiplier=[2.0]), dict(adapter_names=["default"])):
        with steering(model, **request), pytest.raises(ModelError, match="rows hold several sequences"):
            model(**packed)
    with steering(model, [2.0]), torch.no_grad():
        model(**{**packed, "position_ids": torch.tensor([[1, 1, 0, 1, 2]])})  # padding on the left


def test_unloading_leaves_no_hook():
    model = steered("prompt")
    base = model.unload()
    assert not any(module._forward_pre_hooks for module in base.modules())
    base.generate(torch.tensor([[5, 6, 7]]), **OPTIONS)
