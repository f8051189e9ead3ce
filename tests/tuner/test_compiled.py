"""torch.compile: one graph, and no second compilation when strength, adapter or rows change."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import HIDDEN, hand_logits, make_model, random_vectors, set_vectors
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from steer_adapter import SteerConfig, SteerLayer, set_adapters, steering
from steer_adapter.errors import ModelError, VectorError


LAYERS = [1, 2]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=LAYERS))
    set_vectors(model, random_vectors(LAYERS))
    model.add_adapter("other", SteerConfig(layers_to_transform=LAYERS))
    set_vectors(model, random_vectors(LAYERS, seed=2), "other")
    return model.eval()


def by_hand(input_ids, factors, seeds=(1, 1)):
    rows = [
        hand_logits(make_model(), input_ids[i : i + 1], {k: f * v for k, v in random_vectors(LAYERS, seed=s).items()})
        for i, (f, s) in enumerate(zip(factors, seeds, strict=True))
    ]
    return torch.cat(rows)


def test_strength_adapter_and_rows_change_without_compiling_again(model, input_ids):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend=counter)

    def check(factors, seeds=(1, 1)):
        with torch.no_grad():
            received = compiled(input_ids).logits
        assert (received - by_hand(input_ids, factors, seeds)).abs().max() <= 1e-5

    check([1.0, 1.0])
    model.set_multiplier(-2.0)
    check([-2.0, -2.0])
    model.set_adapter("other")
    check([1.0, 1.0], [2, 2])
    with steering(model, [0.5, 3.0]):
        check([0.5, 3.0], [2, 2])
    with steering(model, adapter_names=["default", "other"]):
        check([-2.0, 1.0], [1, 2])
    with steering(model, [2.0, 1.0], adapter_names=["other", "__base__"]):
        check([2.0, 0.0], [2, 2])
    with model.disable_adapter():
        check([0.0, 0.0])
    assert counter.frame_count == 1


def test_a_compiled_peft_model(model, input_ids):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for strength in (1.0, [0.5, -2.0]):
            with steering(model, strength):
                factors = strength if isinstance(strength, list) else [strength] * 2
                assert (compiled(input_ids).logits - by_hand(input_ids, factors)).abs().max() <= 1e-5
        with steering(model, adapter_names=["other", "default"]):
            assert (compiled(input_ids).logits - by_hand(input_ids, [1.0, 1.0], [2, 1])).abs().max() <= 1e-5
        set_adapters(model, {"other": -1.0})
        assert (compiled(input_ids).logits - by_hand(input_ids, [-1.0, -1.0], [2, 2])).abs().max() <= 1e-5
    assert counter.frame_count == 1


def test_a_compiled_model_trains(model, input_ids):
    def gradient(run):
        model.zero_grad()
        with steering(model, [2.0, -1.0]):
            loss = run(input_ids).logits.square().sum()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradient(model)
    received = gradient(torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager"))
    assert len(wanted) == 2 and all(part.any() for part in wanted)
    for first, second in zip(received, wanted, strict=True):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_trains_with_checkpointing(model, input_ids):
    def gradient(run):
        model.zero_grad()
        with steering(model, [2.0, -1.0]):
            loss = run(input_ids, use_cache=False).logits.square().sum()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradient(model.train())
    assert len(wanted) == 2 and all(part.any() for part in wanted)
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    for first, second in zip(gradient(torch.compile(base, backend="aot_eager")), wanted, strict=True):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)


def test_layers_compiled_one_by_one_share_their_code(model, input_ids):
    counter = CompileCounterWithBackend("eager")
    for layer in model.get_base_model().model.layers:
        if hasattr(layer, "steering"):
            layer.compile(fullgraph=True, backend=counter)
    with torch.no_grad(), steering(model, [1.0, -1.0]):
        received = model(input_ids, use_cache=False).logits
    assert (received - by_hand(input_ids, [1.0, -1.0])).abs().max() <= 1e-5
    assert counter.frame_count == 2, (
        "one for the forward of a layer and one for the hook, whatever the number of layers"
    )


def test_a_vector_that_is_not_finite_is_refused_in_compiled_code_too(model, input_ids):
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(input_ids)
    set_vectors(model, {1: torch.full((HIDDEN,), float("nan"))})
    with torch.no_grad(), pytest.raises(VectorError, match="'default' holds NaN"):
        compiled(input_ids)


def test_scopes(input_ids):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=1, token_scope="completion")).eval()
    set_vectors(model, random_vectors([1]))
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with steering(model, 2.0, prompt_lengths=[3, 5]):
            received, wanted = compiled(input_ids).logits, model(input_ids).logits
        assert (received - wanted).abs().max() <= 1e-5
        assert (wanted - make_model()(input_ids).logits).abs().amax(dim=(1, 2)).min() > 0.1, "every row is steered"
        with pytest.raises(ModelError, match="without prompt lengths"):
            compiled(input_ids)


def test_a_copy_is_asked_for_itself(model, input_ids):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.set_multiplier(3.0)
        compiled = torch.compile(other.get_base_model(), fullgraph=True, backend="eager")
        with torch.no_grad():
            assert (compiled(input_ids).logits - by_hand(input_ids, [3.0, 3.0])).abs().max() <= 1e-5
    keys = [int(m.key) for tree in (model, other) for m in tree.modules() if isinstance(m, SteerLayer)]
    assert len(set(keys)) == len(keys)
