from __future__ import annotations

import pytest
import torch
from conftest import hand_logits, make_model, random_vectors, set_vectors
from peft import get_peft_model

from steer_adapter import SteerConfig, set_adapters, set_multiplier, steering
from steer_adapter.errors import AdapterNameError, ConfigError, ModelError


@pytest.fixture
def model():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[1, 2], multiplier=3.0))
    set_vectors(model, random_vectors([1, 2]))
    return model


@pytest.mark.parametrize("value", [2, -0.7, 0.0, torch.tensor(1.25).item()])
def test_the_value_is_absolute(model, input_ids, value):
    set_multiplier(model, 5.0)
    set_multiplier(model, value)
    wanted = hand_logits(make_model(), input_ids, {k: value * v for k, v in random_vectors([1, 2]).items()})
    with torch.no_grad():
        assert (model(input_ids).logits - wanted).abs().max() <= 1e-5


def test_it_is_a_method_of_the_model_too(model, input_ids):
    model.set_multiplier(0.0)
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, make_model()(input_ids).logits)
    assert model.peft_config["default"].multiplier == 3.0, "the live value is not the configured one"


def test_by_name(model, input_ids):
    model.add_adapter("other", SteerConfig(layers_to_transform=[2, 3], init_weights=False))
    set_multiplier(model, -2.0, "other")
    live = {n: m.multipliers for n, m in model.named_modules() if hasattr(m, "multipliers")}
    assert sorted(float(m["other"]) for m in live.values() if "other" in m) == [-2.0, -2.0]
    assert sorted(float(m["default"]) for m in live.values() if "default" in m) == [3.0, 3.0]


def test_on_a_plain_transformers_model(model, input_ids, tmp_path):
    model.save_pretrained(tmp_path)
    plain = make_model()
    plain.load_adapter(tmp_path, "happy")
    set_multiplier(plain, -1.0, "happy")
    wanted = hand_logits(make_model(), input_ids, {k: -v for k, v in random_vectors([1, 2]).items()})
    with torch.no_grad():
        assert (plain(input_ids).logits - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), "1", None, True, 1e39, -1e39, pytest.param(10**400, id="10**400")]
)
def test_a_value_that_is_no_finite_number_changes_nothing(model, input_ids, value):
    with torch.no_grad():
        before = model(input_ids).logits
        with pytest.raises(ConfigError, match="expected a finite number"):
            set_multiplier(model, value)
        with pytest.raises(ConfigError, match="expected a finite number"):
            set_adapters(model, {"default": value})
        with pytest.raises(ConfigError, match="expected a finite number"), steering(model, {"default": value}):
            pass
        assert torch.equal(model(input_ids).logits, before)


def test_unknown_names_and_models(model):
    with pytest.raises(AdapterNameError, match=r"received 'sad', expected one of \['default'\]"):
        set_multiplier(model, 1.0, "sad")
    with pytest.raises(ModelError, match="no steering vector"):
        set_multiplier(make_model(), 1.0)


def logits(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def by_hand(input_ids, *factors, vectors=None):
    """Row i steered with factors[i], each row alone."""
    vectors = vectors or [random_vectors([1, 2])] * len(factors)
    rows = [
        hand_logits(make_model(), input_ids[i : i + 1], {k: factor * v for k, v in vectors[i].items()})
        for i, factor in enumerate(factors)
    ]
    return torch.cat(rows)


@pytest.fixture
def two(model):
    """A second vector on other layers, which is not active."""
    model.add_adapter("other", SteerConfig(layers_to_transform=[0, 2]))
    set_vectors(model, random_vectors([0, 2], seed=2), "other")
    return model.eval()


@pytest.mark.parametrize("values", [[2.0, -1.0], (2, -1), torch.tensor([2.0, -1.0]), torch.tensor([2, -1])])
def test_one_value_per_row(model, input_ids, values):
    with steering(model, multiplier=values):
        assert (logits(model, input_ids) - by_hand(input_ids, 2.0, -1.0)).abs().max() <= 1e-5
    assert (logits(model, input_ids) - by_hand(input_ids, 3.0, 3.0)).abs().max() <= 1e-5


def test_a_float_for_all_rows(model, input_ids):
    with steering(model, -0.5):
        assert (logits(model, input_ids) - by_hand(input_ids, -0.5, -0.5)).abs().max() <= 1e-5


def test_values_by_name_steer_beside_what_is_active(two, input_ids):
    first, second = random_vectors([1, 2]), random_vectors([0, 2], seed=2)
    together = {0: -2 * second[0], 1: 3 * first[1], 2: 3 * first[2] - 2 * second[2]}
    with steering(two, {"other": -2.0}):
        received = logits(two, input_ids)
    assert (received - hand_logits(make_model(), input_ids, together)).abs().max() <= 1e-5
    with steering(two, {"other": [1.0, 0.0], "default": 0.0}):
        received = logits(two, input_ids)
    assert (received - by_hand(input_ids, 1.0, 0.0, vectors=[second, second])).abs().max() <= 1e-5


def test_several_at_once_for_good(two, input_ids, tmp_path):
    first, second = random_vectors([1, 2]), random_vectors([0, 2], seed=2)
    wanted = {0: -0.5 * second[0], 1: 2 * first[1], 2: 2 * first[2] - 0.5 * second[2]}
    two.save_pretrained(tmp_path)
    plain = make_model()
    plain.load_adapter(tmp_path / "other", "other")
    plain.load_adapter(tmp_path, "default")
    for model in (two, plain):
        set_adapters(model, {"default": 2.0, "other": -0.5})
        assert (logits(model, input_ids) - hand_logits(make_model(), input_ids, wanted)).abs().max() <= 1e-5
    assert two.active_adapters == plain.active_adapters() == ["default", "other"]
    assert [p.requires_grad for n, p in two.named_parameters() if "steer_vector" in n] == [True] * 4
    set_adapters(two, {"other": 1.0})
    assert (logits(two, input_ids) - hand_logits(make_model(), input_ids, second)).abs().max() <= 1e-5
    for bad, error in (({}, AdapterNameError), ({"nobody": 1.0}, AdapterNameError), ({"other": "1"}, ConfigError)):
        with pytest.raises(error):
            set_adapters(two, bad)
    with pytest.raises(ConfigError, match="expected a finite number"):
        set_adapters(two, {"other": [1.0, 2.0]})
    assert two.active_adapters == ["other"]


def test_a_vector_for_each_row(two, input_ids):
    first, second = random_vectors([1, 2]), random_vectors([0, 2], seed=2)
    with steering(two, adapter_names=["other", "default"]):
        received = logits(two, input_ids)
    assert (received - by_hand(input_ids, 1.0, 3.0, vectors=[second, first])).abs().max() <= 1e-5
    with steering(two, [-1.0, 4.0], adapter_names=["other", "__base__"]):
        received = logits(two, input_ids)
    assert (received - by_hand(input_ids, -1.0, 0.0, vectors=[second, first])).abs().max() <= 1e-5
    with steering(two, {"default": 0.5}, adapter_names=["other", "default"]):
        received = logits(two, input_ids)
    assert (received - by_hand(input_ids, 1.0, 0.5, vectors=[second, first])).abs().max() <= 1e-5


def test_adapter_names_of_peft(two, input_ids):
    first, second = random_vectors([1, 2]), random_vectors([0, 2], seed=2)
    received = logits(two, input_ids, adapter_names=["__base__", "other"])
    assert (received - by_hand(input_ids, 0.0, 1.0, vectors=[first, second])).abs().max() <= 1e-5
    with two.disable_adapter():
        received = logits(two, input_ids, adapter_names=["default", "other"])
    assert torch.equal(received, logits(make_model(), input_ids))
    for name in ("default", "__base__"):
        with pytest.raises(ModelError, match="Length of `adapter_names` should .* but got 3 and 2 respectively"):
            two(input_ids, adapter_names=[name] * 3)
    message = (
        r"Trying to infer with non-existing adapter\(s\): anybody, nobody; expected names from \['__base__', 'def"
    )
    with pytest.raises(AdapterNameError, match=message):
        two(input_ids, adapter_names=["nobody", "anybody"])
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        two.train()(input_ids, adapter_names=["default", "other"])


@pytest.mark.parametrize(
    "options", [dict(), dict(num_beams=3), dict(num_beams=4, num_return_sequences=2), dict(use_cache=False)]
)
def test_generate_by_row_equals_each_row_alone(two, input_ids, options, tmp_path):
    options = dict(options, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    names = ["other", "__base__", "default"]
    prompts = torch.cat([input_ids, input_ids[:1].flip(1)])
    received = two.generate(input_ids=prompts, adapter_names=names, **options)
    per_row = options.get("num_return_sequences", 1)
    with steering(two, adapter_names=names):
        again = two.generate(input_ids=prompts, **options)
    assert torch.equal(received, again)
    for row, name in enumerate(names):
        if name == "__base__":
            alone = make_model().generate(input_ids=prompts[row : row + 1], **options)
        else:
            two.set_adapter(name)
            alone = two.generate(input_ids=prompts[row : row + 1], **options)
        assert torch.equal(received[row * per_row : (row + 1) * per_row], alone)
        plain = make_model().generate(input_ids=prompts[row : row + 1], **options)
        assert torch.equal(alone, plain) == (name == "__base__")


def test_on_a_transformers_model_by_name_and_row(two, input_ids, tmp_path):
    two.save_pretrained(tmp_path)
    plain = make_model()
    plain.load_adapter(tmp_path / "other", "other")
    plain.load_adapter(tmp_path, "default")
    first, second = random_vectors([1, 2]), random_vectors([0, 2], seed=2)
    with steering(plain, adapter_names=["other", "default"]):
        received = logits(plain, input_ids)
        tokens = plain.generate(input_ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert (received - by_hand(input_ids, 1.0, 3.0, vectors=[second, first])).abs().max() <= 1e-5
    wanted = two.generate(
        input_ids=input_ids, adapter_names=["other", "default"], max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert torch.equal(tokens, wanted)


def test_gradient_flows_to_the_right_rows(two, input_ids):
    two.train()
    for parameter in (p for n, p in two.named_parameters() if "steer_vector" in n):
        parameter.requires_grad_(True)

    def gradients(run):
        two.zero_grad()
        run()
        return {n: p.grad.clone() for n, p in two.named_parameters() if p.grad is not None and p.grad.any()}

    def by_row():
        with steering(two, [2.0, -1.0], adapter_names=["other", "default"]):
            two(input_ids, labels=None).logits.sum().backward()

    def one_by_one():
        for name, value, row in (("other", 2.0, 0), ("default", -1.0, 1)):
            two.base_model.set_adapter(name)
            two.set_multiplier(value)
            two(input_ids[row : row + 1]).logits.sum().backward()

    received, wanted = gradients(by_row), gradients(one_by_one)
    assert received.keys() == wanted.keys() and len(received) == 4
    for name in wanted:
        assert torch.allclose(received[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_a_multiplier_may_be_trained_itself(model, input_ids):
    strength = torch.tensor([1.0, 2.0], requires_grad=True)
    with steering(model, strength):
        model(input_ids).logits.square().sum().backward()
    assert strength.grad is not None and strength.grad.all()


BAD = [
    (dict(), ConfigError, "received nothing to set"),
    (dict(multiplier=float("nan")), ConfigError, "expected a finite number"),
    (dict(multiplier="2"), ConfigError, "expected a finite number"),
    (dict(multiplier=True), ConfigError, "expected a finite number"),
    (dict(multiplier=[]), ConfigError, "expected a finite number"),
    (dict(multiplier=[1.0, float("inf")]), ConfigError, "expected a finite number"),
    (dict(multiplier=[[1.0]]), ConfigError, "expected a finite number"),
    (
        dict(multiplier={"nobody": 1.0}),
        AdapterNameError,
        r"non-existing adapter\(s\): nobody; expected names from \['default'\]",
    ),
    (dict(multiplier={"__base__": 1.0}), AdapterNameError, r"non-existing adapter\(s\): __base__"),
    (dict(adapter_names=["default", ["default"]]), AdapterNameError, r"non-existing adapter\(s\): \['default'\]"),
    (dict(adapter_names="default"), AdapterNameError, "expected a list with a name for each row"),
    (dict(adapter_names=[]), AdapterNameError, "expected a list with a name for each row"),
    (dict(adapter_names=["default", None]), AdapterNameError, r"non-existing adapter\(s\): None"),
    (dict(adapter_names=["default"], multiplier=[1.0, 2.0]), ConfigError, r"values for \[1, 2\] rows"),
    (dict(prompt_lengths=[0, 1]), ConfigError, "expected a positive integer for each row"),
    (dict(prompt_lengths=[1.5]), ConfigError, "expected a positive integer for each row"),
    (dict(prompt_lengths=3), ConfigError, "expected a positive integer for each row"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_requests_change_nothing(model, input_ids, arguments, error, message):
    before = logits(model, input_ids)
    with pytest.raises(error, match=message), steering(model, **arguments):
        raise AssertionError("entered")
    assert torch.equal(logits(model, input_ids), before)


def test_merged_vectors_have_no_strength_of_their_own(input_ids):
    merged = get_peft_model(make_model("gpt2"), SteerConfig(layers_to_transform=[1], init_weights=False)).eval()
    merged.merge_adapter()
    with pytest.raises(ModelError, match="Cannot pass `multiplier` when there are merged"), steering(merged, 2.0):
        pass
    words = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first"
    with pytest.raises(ModelError, match=words):
        merged(input_ids, adapter_names=["default", "__base__"])
    merged.unmerge_adapter()
    assert not torch.equal(logits(merged, input_ids), logits(make_model("gpt2"), input_ids))
    with steering(merged, 0.0):
        assert torch.equal(logits(merged, input_ids), logits(make_model("gpt2"), input_ids))


def test_as_many_values_as_rows_are_expected(model, input_ids):
    with steering(model, [1.0, 2.0, 3.0]), pytest.raises(ModelError, match="values for 3 rows, but the model runs 2"):
        logits(model, input_ids)
    with pytest.raises(ModelError, match="carries no steering vector"), steering(make_model(), 1.0):
        pass
