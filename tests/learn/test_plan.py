from __future__ import annotations

import copy

import pytest
import torch
from conftest import ARCHITECTURES, HIDDEN, VOCAB, make_model
from peft import get_peft_model
from tiny_runs import trainer
from transformers import AutoModelForCausalLM

from steer_adapter import SteerConfig
from steer_adapter.errors import ModelError
from steer_adapter.learn.cache import StateCache
from steer_adapter.learn.plan import plan, shape_of
from steer_adapter.learn.shortcut import lengths


def config(architecture="llama"):
    return copy.deepcopy(ARCHITECTURES[architecture][0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_model(architecture, dtype):
    shape = shape_of(config(architecture), [1], dtype)
    model = AutoModelForCausalLM.from_config(config(architecture)).to(dtype)
    assert shape.weights == sum(p.nbytes for p in model.parameters())
    assert shape.state == HIDDEN * dtype.itemsize
    assert shape.logits == 512 * VOCAB * (2 * dtype.itemsize + 8)


def test_activations_are_what_a_forward_keeps():
    tokens, kept = 37, {}
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=1))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = []

    def keep(tensor):
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in weights and tensor.shape[-2:] != (tokens, tokens):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model.model.model(torch.zeros(1, tokens, dtype=torch.long), attention_mask=mask, use_cache=False)
    planned = shape_of(config(), [1], torch.float32).above
    assert planned == pytest.approx(sum(kept.values()) / tokens, rel=0.25)


def test_the_later_the_layer_the_less_is_kept():
    above = [shape_of(config(), [layer], torch.float32).above for layer in range(4)]
    assert above == sorted(above, reverse=True) and above[0] > 2 * above[2]


def test_the_cache_is_what_training_asks_room_for(tmp_path, monkeypatch):
    asked, written = [], []
    put = StateCache.put
    monkeypatch.setattr(StateCache, "check_room", lambda self, size, others: asked.append(size))
    monkeypatch.setattr(
        StateCache, "put", lambda self, key, entry: (written.append(entry.states.nbytes), put(self, key, entry))[1]
    )
    run = trainer(tmp_path, make_model())
    run.train()
    sizes = list(lengths(run.train_dataset, run.args.max_length))
    need = plan(shape_of(config(), [1], torch.float32), sizes, batch=4, processes=2, memory=0)["one"]
    assert need.disk - 16 * len(sizes) == asked[0] and need.host == 0
    # The last token of each answer predicts nothing, and answers may begin alike.
    assert 0.7 * asked[0] < sum(written[-len(sizes) :]) <= asked[0]


def test_three_ways():
    shape = shape_of(config(), [1], torch.float32)
    needs = plan(shape, [10, 30, 20], batch=2, processes=4, memory=10**9)
    step = 50 * (shape.above + shape.working) + shape.logits
    cache = 60 * HIDDEN * 4 + 3 * 16
    assert needs["one"].device == needs["parallel"].device == shape.weights + step
    assert (needs["one"].host, needs["one"].disk) == (cache, 0)
    assert (needs["parallel"].host, needs["parallel"].disk) == (0, cache)
    assert needs["sharded"].device == shape.weights // 4 + 2 * shape.layer + shape.outside + step
    long = plan(shape, [1024, 7], batch=1, processes=4, memory=0)  # two chunks of logits, made at once
    assert long["sharded"].device - needs["sharded"].device == 974 * (shape.above + shape.working) + shape.logits
    assert (needs["sharded"].host, needs["sharded"].disk) == (4 * shape.weights, 0)
    assert shape.outside + 4 * shape.layer == shape.weights


def test_several_vectors_keep_the_states_of_all():
    shape = shape_of(config(), [1], torch.float32)
    one, three = (plan(shape, [10, 30], batch=2, processes=2, memory=9000, vectors=n)["one"] for n in (1, 3))
    assert one.host == 40 * HIDDEN * 4 + 32 <= 9000 < 3 * one.host
    assert (three.device, three.host, three.disk) == (one.device, 0, 3 * one.host)


def test_a_layer_that_is_not_there():
    with pytest.raises(ModelError, match="expected values from -4 to 3"):
        shape_of(config(), [7], torch.float32)
