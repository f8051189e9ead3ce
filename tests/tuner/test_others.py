"""What other tuners do to vectors, undone: files, switches, books, unloading, in either order."""

from __future__ import annotations

import pytest
import torch
from conftest import hand_logits, make_model, random_vectors, set_vectors
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file

from steer_adapter import SteerConfig, SteerLayer
from steer_adapter.errors import AdapterNameError, ConfigError, SteerError
from steer_adapter.tuner.others import spare_vectors


pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:You are trying to modify a model with PEFT for a second time"
)
CONFIGS = {
    "lora": LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "dora": LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=True),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
}


@pytest.fixture(params=list(CONFIGS))
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def tuned_dir(config, tmp_path):
    """The file that PEFT saves of an adapter without a vector."""
    torch.manual_seed(3)
    model = get_peft_model(make_model(), config)
    if isinstance(config, IA3Config):
        for name, parameter in model.named_parameters():
            if "ia3_" in name:
                torch.nn.init.normal_(parameter.data, 1.0, 0.2)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.fixture
def vector_dir(tmp_path, input_ids):
    steered = steer(make_model())
    wanted = hand_logits(make_model(), input_ids, random_vectors([1, 3]))
    assert close(logits(steered, input_ids), wanted) and not close(wanted, logits(make_model(), input_ids))
    steered.save_pretrained(tmp_path / "vector")
    return tmp_path / "vector"


def steer(model, **kwargs):
    model = get_peft_model(model, SteerConfig(layers_to_transform=[1, 3]), **kwargs).eval()
    set_vectors(model, random_vectors([1, 3]), kwargs.get("adapter_name", "default"))
    return model


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def close(received, wanted):
    return (received - wanted).abs().max() <= 1e-5


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_twice_is_once():
    spare_vectors()
    saving = BaseTuner._get_adapter_state_dict.__func__
    spare_vectors()
    assert BaseTuner._get_adapter_state_dict.__func__ is saving


@pytest.mark.parametrize("name", ["default", "happy"])
def test_the_file_of_a_tuner_inside_is_as_without_the_vector(tuned_dir, vector_dir, tmp_path, name):
    tuned = PeftModel.from_pretrained(make_model(), tuned_dir)
    model = PeftModel.from_pretrained(tuned, vector_dir, adapter_name=name)
    tuned.save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tuned_dir)
    model.save_pretrained(tmp_path / "vector_again")
    saved = tmp_path / "vector_again" / ("" if name == "default" else name)
    assert weights(saved) == weights(vector_dir)


def test_a_tuner_around_a_steered_model(tuned_dir, vector_dir, tmp_path, input_ids):
    both = logits(steer(PeftModel.from_pretrained(make_model(), tuned_dir)), input_ids)
    steered = PeftModel.from_pretrained(make_model(), vector_dir)
    model = PeftModel.from_pretrained(steered, tuned_dir)
    assert close(logits(model, input_ids), both), "its keys are found one level deeper"
    assert isinstance(steered.peft_config["default"], SteerConfig), "each keeps its own books"
    model.save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tuned_dir)
    steered.save_pretrained(tmp_path / "vector_again")
    assert weights(tmp_path / "vector_again") == weights(vector_dir)


def test_a_file_that_took_a_vector_along_does_not_overwrite_one(tuned_dir, tmp_path, input_ids):
    polluted = load_file(tuned_dir / "adapter_model.safetensors")
    polluted["base_model.model.model.layers.1.steering.steer_vector"] = torch.full((32,), 9.0)
    save_file(polluted, tuned_dir / "adapter_model.safetensors")
    steered = steer(make_model())
    PeftModel.from_pretrained(steered, tuned_dir)
    assert torch.equal(
        steered.get_parameter("base_model.model.model.layers.1.steering.steer_vector.default"),
        random_vectors([1, 3])[1],
    )


@pytest.mark.parametrize("inside", ["tuned", "vector"])
def test_switching_one_off_leaves_the_other(tuned_dir, vector_dir, input_ids, inside):
    tuned = logits(PeftModel.from_pretrained(make_model(), tuned_dir), input_ids)
    steered = logits(PeftModel.from_pretrained(make_model(), vector_dir), input_ids)
    folders = (tuned_dir, vector_dir) if inside == "tuned" else (vector_dir, tuned_dir)
    inner = PeftModel.from_pretrained(make_model(), folders[0])
    outer = PeftModel.from_pretrained(inner, folders[1])
    lora, vector = (inner, outer) if inside == "tuned" else (outer, inner)
    both = logits(outer, input_ids)
    with lora.disable_adapter():
        assert close(logits(outer, input_ids), steered)
    with vector.disable_adapter():
        assert close(logits(outer, input_ids), tuned)
        with lora.disable_adapter():
            assert close(logits(outer, input_ids), logits(make_model(), input_ids))
        assert close(logits(outer, input_ids), tuned), "still off"
    assert torch.equal(logits(outer, input_ids), both)


def test_trainability_of_a_vector_of_the_same_name(config):
    tuned = get_peft_model(make_model(), config)
    model = steer(tuned)
    tuned.set_requires_grad("default", True)
    tuned.set_requires_grad("default", False)
    assert [n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad] == ["steer_vector"] * 2


@pytest.mark.parametrize("act", ["unload", "merge_and_unload"])
def test_a_tuner_around_is_unloaded(tuned_dir, vector_dir, input_ids, act):
    steered = PeftModel.from_pretrained(make_model(), vector_dir)
    vector_only = logits(steered, input_ids)
    model = PeftModel.from_pretrained(steered, tuned_dir)
    wanted = logits(model, input_ids) if act == "merge_and_unload" else vector_only
    assert getattr(model, act)() is steered
    assert (logits(steered, input_ids) - wanted).abs().max() <= 1e-4
    assert isinstance(steered.peft_config["default"], SteerConfig)
    base = steered.unload()
    assert not hasattr(base, "peft_config") and not any(isinstance(m, SteerLayer) for m in base.modules())


def test_a_vector_inside_is_unloaded(tuned_dir, vector_dir, input_ids):
    steered = PeftModel.from_pretrained(make_model(), vector_dir)
    model = PeftModel.from_pretrained(steered, tuned_dir)
    steered.unload()
    assert close(logits(model, input_ids), logits(PeftModel.from_pretrained(make_model(), tuned_dir), input_ids))


@pytest.mark.parametrize("act", ["unload", "merge_and_unload"])
def test_a_tuner_around_a_natively_loaded_vector(tuned_dir, vector_dir, tmp_path, input_ids, act):
    native = make_model()
    native.load_adapter(vector_dir, "happy")
    vector_only = logits(native, input_ids)
    model = PeftModel.from_pretrained(native, tuned_dir, adapter_name="tuned")
    with model.disable_adapter():
        assert close(logits(model, input_ids), vector_only)
    both = logits(model, input_ids)
    model.save_pretrained(tmp_path / "again", selected_adapters=["tuned"])
    assert weights(tmp_path / "again" / "tuned") == weights(tuned_dir)
    assert getattr(model, act)() is native
    assert (logits(native, input_ids) - (both if act == "merge_and_unload" else vector_only)).abs().max() <= 1e-4
    assert list(native.peft_config) == ["happy"]


def test_the_name_of_a_natively_loaded_vector_is_not_taken(vector_dir, config):
    native = make_model()
    native.load_adapter(vector_dir, "default")
    with pytest.raises(AdapterNameError, match="received 'default', which the model uses for a steering vector"):
        get_peft_model(native, config)
    assert isinstance(native.peft_config["default"], SteerConfig)


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_trained_modules_around_a_steered_model_are_refused(input_ids, extra):
    steered = steer(make_model())
    before = logits(steered, input_ids)
    with pytest.raises(ConfigError, match=f"`{next(iter(extra))}`: received .* expected None"):
        get_peft_model(steered, LoraConfig(target_modules=["q_proj"], **extra))
    assert torch.equal(logits(steered, input_ids), before) and list(steered.peft_config) == ["default"]
    assert not any("lora_" in name for name, _ in steered.named_modules())


@pytest.mark.parametrize("native", [False, True])
def test_a_second_peft_model_with_vectors_is_refused(vector_dir, input_ids, native):
    if native:
        steered = make_model()
        steered.load_adapter(vector_dir, "first")
    else:
        steered = PeftModel.from_pretrained(make_model(), vector_dir, adapter_name="first")
    before = logits(steered, input_ids)
    with pytest.raises(SteerError, match=r"carries the steering vectors \['first'\] already"):
        PeftModel.from_pretrained(steered, vector_dir, adapter_name="second")
    assert torch.equal(logits(steered, input_ids), before) and list(steered.peft_config) == ["first"]
    steered.load_adapter(vector_dir, "second")  # the way that the message names
    (steered if native else steered.base_model).set_adapter(["first", "second"])
    twice = steer(make_model())
    twice.set_multiplier(2.0)
    assert close(logits(steered, input_ids), logits(twice, input_ids))
