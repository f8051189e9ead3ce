"""What PEFT's users expect of every method: saving, loading, switching, deleting, and the reports about it."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, hand_logits, make_model, random_vectors, set_vectors
from peft import (
    PeftConfig,
    PeftModel,
    TaskType,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from steer_adapter import SteerConfig
from steer_adapter.errors import VectorError


LAYERS = [1, 3]
ARCHITECTURES = ["llama", "gpt2", "gemma3"]


@pytest.fixture
def steered() -> PeftModel:
    return steer(make_model())


@pytest.fixture
def adapter_dir(steered, tmp_path) -> Path:
    steered.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def steer(model, name="default", seed=1, **kwargs) -> PeftModel:
    model = get_peft_model(model, SteerConfig(layers_to_transform=LAYERS, **kwargs), adapter_name=name)
    set_vectors(model, random_vectors(LAYERS, seed=seed), name)
    return model.eval()


def logits(model, input_ids=None, **kwargs):
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def by_hand(input_ids, factor=1.0, seed=1):
    deltas = {layer: factor * vector for layer, vector in random_vectors(LAYERS, seed=seed).items()}
    return hand_logits(make_model(), input_ids, deltas)


def close(received, wanted):
    return (received - wanted).abs().max() <= 1e-5


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


######################
# Saving and loading #
######################


@pytest.mark.parametrize("names", [["default", "default2", "other_default", "foodefault_bar", "efaul"], ["a", "b"]])
def test_names_that_contain_each_other(names, tmp_path, input_ids):
    model = steer(make_model(), names[0])
    for seed, name in enumerate(names[1:], start=2):
        model.add_adapter(name, SteerConfig(layers_to_transform=LAYERS))
        set_vectors(model, random_vectors(LAYERS, seed=seed), name)
    for seed, name in enumerate(names, start=1):
        model.save_pretrained(tmp_path / name, selected_adapters=[name])
        assert [path.parent.name for path in (tmp_path / name).rglob("*.safetensors")] == [name]
        (file,) = (tmp_path / name).rglob("*.safetensors")
        assert sorted(tensor.tolist() for tensor in load_file(file).values()) == sorted(
            vector.tolist() for vector in random_vectors(LAYERS, seed=seed).values()
        )
        assert close(
            logits(PeftModel.from_pretrained(make_model(), file.parent), input_ids), by_hand(input_ids, seed=seed)
        )


def test_selected_adapters(steered, tmp_path):
    steered.add_adapter("other", SteerConfig(layers_to_transform=2))
    steered.save_pretrained(tmp_path / "all")
    assert {path.parent.name for path in (tmp_path / "all").rglob("adapter_config.json")} == {"all", "other"}
    steered.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert {path.parent.name for path in (tmp_path / "one").rglob("adapter_config.json")} == {"one"}
    with pytest.raises(ValueError, match="unknown"):
        steered.save_pretrained(tmp_path / "none", selected_adapters=["unknown"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_several_are_loaded_one_after_another(architecture, low_cpu_mem_usage, tmp_path, input_ids):
    steer(make_model(architecture)).save_pretrained(tmp_path)
    options = dict(low_cpu_mem_usage=low_cpu_mem_usage)
    with warnings.catch_warnings(record=True) as caught:
        model = PeftModel.from_pretrained(make_model(architecture), tmp_path, **options)
        for name in ("other", "yet-another"):
            result = model.load_adapter(tmp_path, name, **options)
            assert not result.missing_keys and not result.unexpected_keys
    assert not any("missing adapter keys" in str(warning.message) for warning in caught)
    assert not any(parameter.is_meta for parameter in model.parameters())
    deltas = {layer: 3 * vector for layer, vector in random_vectors(LAYERS).items()}
    model.base_model.set_adapter(["default", "other", "yet-another"])
    assert (logits(model, input_ids) - hand_logits(make_model(architecture), input_ids, deltas)).abs().max() <= 1e-4


def test_injection_with_low_memory_is_on_meta():
    model = inject_adapter_in_model(SteerConfig(), make_model(), low_cpu_mem_usage=True)
    assert {p.is_meta for name, p in model.named_parameters() if "steer_vector" in name} == {True}


def test_the_config_that_is_given_is_the_one_in_use(adapter_dir, input_ids):
    config = SteerConfig(layers_to_transform=[1, -1], multiplier=2.0)
    get_peft_model(make_model(), config)
    model = PeftModel.from_pretrained(make_model(), adapter_dir, config=config)
    assert model.peft_config["default"] is config and config.inference_mode
    assert close(logits(model, input_ids), by_hand(input_ids, 2.0)), "its multiplier, not the file's"


@pytest.mark.parametrize("is_trainable", [False, True])
def test_is_trainable(adapter_dir, is_trainable):
    model = PeftModel.from_pretrained(make_model(), adapter_dir, is_trainable=is_trainable)
    model.load_adapter(adapter_dir, "other", is_trainable=is_trainable)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == (4 if is_trainable else 0) and all("steer_vector" in name for name in trainable)
    assert model.peft_config["other"].inference_mode is not is_trainable


def test_loading_into_a_name_that_exists_takes_the_vector(adapter_dir, input_ids):
    """As a Trainer does with the best checkpoint. The multiplier is the model's: PEFT reads no config then."""
    model = steer(make_model(), seed=5, multiplier=2.0)
    model.load_adapter(adapter_dir, "default")
    assert close(logits(model, input_ids), by_hand(input_ids, 2.0))


def test_a_state_dict_is_taken_instead_of_the_models(steered, input_ids):
    doubled = {key: 2 * value for key, value in steered.state_dict().items()}
    saved = get_peft_model_state_dict(steered, state_dict=doubled)
    vectors = random_vectors(LAYERS)
    assert [key.split(".")[4] for key in saved] == ["1", "3"]
    assert all(torch.equal(saved[key], 2 * vectors[int(key.split(".")[4])]) for key in saved)
    result = set_peft_model_state_dict(steered, saved)
    assert not result.unexpected_keys and close(logits(steered, input_ids), by_hand(input_ids, 2.0))


def test_the_base_models_state_dict(steered):
    base = make_model().state_dict()
    received = get_base_model_state_dict(steered)
    assert received.keys() == base.keys() and all(torch.equal(received[key], base[key]) for key in base)
    with torch.no_grad():
        steered.get_base_model().lm_head.weight.add_(1.0)
    result = set_base_model_state_dict(steered, base, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(get_base_model_state_dict(steered)["lm_head.weight"], base["lm_head.weight"])


def test_pickled_weights_are_not_read(steered, tmp_path):
    with pytest.raises(VectorError, match="Save without safe_serialization=False"):
        steered.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled" / "adapter_config.json").exists()
    steered.save_pretrained(tmp_path)
    vectors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(vectors, tmp_path / "adapter_model.bin")
    with pytest.raises(VectorError, match="pickled weights"):
        PeftModel.from_pretrained(make_model(), tmp_path)


@pytest.mark.parametrize("option", ["autocast_adapter_dtype", "ephemeral_gpu_offload"])
def test_options_of_other_methods_change_nothing(adapter_dir, input_ids, option):
    model = PeftModel.from_pretrained(make_model().bfloat16(), adapter_dir, **{option: False})
    model.load_adapter(adapter_dir, "other", **{option: False})
    assert {p.dtype for name, p in model.named_parameters() if "steer_vector" in name} == {torch.float32}
    assert torch.equal(
        logits(model, input_ids), logits(PeftModel.from_pretrained(make_model().bfloat16(), adapter_dir), input_ids)
    )


def test_hotswapping_is_refused_before_anything_is_changed(steered, adapter_dir, input_ids):
    before = logits(steered, input_ids)
    with pytest.raises(ValueError, match="STEER was passed"):
        hotswap_adapter(steered, adapter_dir, "default")
    assert torch.equal(logits(steered, input_ids), before)


##########
# Config #
##########


def test_the_config_survives_copying_pickling_and_saving(tmp_path):
    config = SteerConfig(layers_to_transform=[2, 1], multiplier=-1.5, task_type="CAUSAL_LM")
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and again.to_dict() == config.to_dict()
    model = get_peft_model(make_model(), config)
    for again in (copy.deepcopy(model.peft_config["default"]), pickle.loads(pickle.dumps(config))):
        assert again == config
    config.save_pretrained(tmp_path / "config")
    assert SteerConfig.from_pretrained(tmp_path / "config").to_dict() == config.to_dict()
    model.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, SteerConfig) and again.multiplier == -1.5 and again.layers_to_transform == [1, 2]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "STEER"
    assert type(PeftConfig.from_peft_type(peft_type="STEER")) is SteerConfig


@pytest.mark.parametrize("task_type", [*TaskType, None])
def test_every_task_type(task_type):
    assert SteerConfig(task_type=task_type).task_type == task_type


def test_an_unknown_task_type():
    with pytest.raises(ValueError, match="Invalid task type"):
        SteerConfig(task_type="invalid")


def test_unknown_keys_of_the_file_are_dropped_with_a_warning(adapter_dir, input_ids):
    file = adapter_dir / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        model = PeftModel.from_pretrained(make_model(), adapter_dir)
    assert close(logits(model, input_ids), by_hand(input_ids))


#############################
# Switching and deleting    #
#############################


def test_weights_that_are_not_initialized_change_the_output(input_ids):
    for architecture in ARCHITECTURES:
        bare = logits(make_model(architecture), input_ids)
        steered = get_peft_model(make_model(architecture), SteerConfig(init_weights=False))
        assert (logits(steered, input_ids) - bare).abs().max() > 0.1
        assert torch.equal(logits(get_peft_model(make_model(architecture), SteerConfig()), input_ids), bare)


def test_active_adapters(steered, input_ids):
    steered.add_adapter("other", SteerConfig(layers_to_transform=2))
    assert steered.active_adapters == ["default"] and steered.active_adapter == "default"
    steered.set_adapter("other")
    assert steered.active_adapters == ["other"] and steered.active_adapter == "other"
    assert torch.equal(logits(steered, input_ids), logits(make_model(), input_ids))
    assert all(layer.active_adapters == ["other"] for layer in layers_of(steered))
    steered.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in steered.parameters())
    with pytest.raises(ValueError, match="unknown"):
        steered.set_adapter("unknown")
    assert close(logits(steered, input_ids), by_hand(input_ids))


def test_nested_contexts_restore_what_was(steered, input_ids):
    bare, on = logits(make_model(), input_ids), logits(steered, input_ids)
    assert not close(on, bare)
    with steered.disable_adapter():
        with steered.disable_adapter():
            assert torch.equal(logits(steered, input_ids), bare)
        assert torch.equal(logits(steered, input_ids), bare)
    assert torch.equal(logits(steered, input_ids), on)
    steered.base_model.disable_adapter_layers()
    with steered.disable_adapter():
        pass
    assert torch.equal(logits(steered, input_ids), bare), "off before, off after"
    steered.base_model.enable_adapter_layers()
    assert torch.equal(logits(steered, input_ids), on)


def test_a_context_is_left_by_an_exception(steered, input_ids):
    on = logits(steered, input_ids)
    assert not close(on, logits(make_model(), input_ids))
    with pytest.raises(RuntimeError, match="on purpose"), steered.disable_adapter():
        raise RuntimeError("on purpose")
    assert torch.equal(logits(steered, input_ids), on)


def test_one_layer_switched_off_is_reported(steered, input_ids):
    layers_of(steered)[0].enable_adapters(False)
    assert steered.get_model_status().enabled == "irregular"
    with pytest.warns(UserWarning, match="some adapter layers that are enabled and others"), steered.disable_adapter():
        pass
    assert close(logits(steered, input_ids), by_hand(input_ids)), "PEFT enables all then"


@pytest.mark.parametrize("active", [False, True])
def test_deleting(steered, active, input_ids):
    steered.add_adapter("delete_me", SteerConfig(layers_to_transform=[1, 2], init_weights=False))
    if active:
        steered.set_adapter("delete_me")
    steered.delete_adapter("delete_me")
    assert list(steered.peft_config) == ["default"] and steered.active_adapters == ["default"]
    for layer in layers_of(steered):
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "delete_me" not in getattr(layer, name)
    assert close(logits(steered, input_ids), by_hand(input_ids))
    steered.delete_adapter("default")
    assert steered.active_adapters == [] and not steered.peft_config
    assert torch.equal(steered.base_model(input_ids).logits, make_model()(input_ids).logits)


def test_deleting_what_does_not_exist(steered, input_ids):
    with pytest.raises(ValueError, match="unknown-adapter"):
        steered.delete_adapter("unknown-adapter")
    assert close(logits(steered, input_ids), by_hand(input_ids))


def test_a_name_that_exists_is_not_added_again(steered, input_ids):
    with pytest.raises(ValueError, match="default"):
        steered.add_adapter("default", SteerConfig(layers_to_transform=2))
    assert steered.peft_config["default"].layers_to_transform == LAYERS
    assert close(logits(steered, input_ids), by_hand(input_ids))


def test_unloading_and_steering_again(steered, input_ids):
    base = steered.unload()
    assert not hasattr(base, "peft_config") and not layers_of(base)
    assert torch.equal(logits(base, input_ids), logits(make_model(), input_ids))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(second time|Already found)")
        again = steer(base)
    assert close(logits(again, input_ids), by_hand(input_ids))


def test_copies_are_independent(steered, input_ids):
    copied = copy.deepcopy(steered)
    set_vectors(steered, random_vectors(LAYERS, seed=9))
    steered.set_multiplier(0.5)
    assert close(logits(copied, input_ids), by_hand(input_ids))
    copied.unload()
    assert close(logits(steered, input_ids), by_hand(input_ids, 0.5, seed=9))


###########
# Running #
###########


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_as_input(architecture, input_ids):
    model = steer(make_model(architecture), "test-adapter")
    embeddings = model.get_input_embeddings()(input_ids)
    assert close(logits(model, inputs_embeds=embeddings), logits(model, input_ids))
    assert not close(logits(model, inputs_embeds=embeddings), logits(make_model(architecture), input_ids))


def test_layer_indexing(input_ids):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[0]))
    model(input_ids).logits.sum().backward()
    ((name, gradient),) = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    assert gradient.any() and name == "base_model.model.model.layers.0.steering.steer_vector.default"
    everywhere = get_peft_model(make_model(), SteerConfig())
    assert sum("steer_vector" in name for name, _ in everywhere.named_parameters()) == 4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(input_ids, use_reentrant):
    model = steer(make_model()).train()

    def gradients():
        model.zero_grad()
        (model(input_ids).logits ** 2).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model._prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() and len(plain) == 2 and all(part.any() for part in plain.values())
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=1e-4) for name in plain)


def test_preparing_for_training_on_few_bits(input_ids):
    model = prepare_model_for_kbit_training(make_model().half())
    assert not any(p.requires_grad for p in model.parameters())
    model = get_peft_model(model, SteerConfig(layers_to_transform=1))
    assert not model.get_input_embeddings()(input_ids).requires_grad or model.is_gradient_checkpointing
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(input_ids).requires_grad
    model.train()(input_ids, labels=input_ids).loss.backward()
    assert [p.grad is not None for n, p in model.named_parameters() if "steer_vector" in n] == [True]


###########
# Reports #
###########


def test_status_of_layers_and_model(steered):
    steered.add_adapter("other", SteerConfig(layers_to_transform=[2, 3]))
    layers = steered.get_layer_status()
    assert [layer.name.removeprefix("model.model.") for layer in layers] == [f"layers.{i}.steering" for i in (1, 2, 3)]
    assert [layer.available_adapters for layer in layers] == [["default"], ["other"], ["default", "other"]]
    assert {layer.module_type for layer in layers} == {"SteerLayer"}
    status = steered.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM" and status.adapter_model_type == "SteerModel"
    assert status.peft_types == {"default": "STEER", "other": "STEER"} and status.num_adapter_layers == 3
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False} and status.trainable_params == 2 * HIDDEN
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    with steered.disable_adapter():
        assert steered.get_model_status().enabled is False


def test_trainable_parameters_are_counted(steered, capsys):
    total = sum(p.numel() for p in make_model().parameters()) + 2 * HIDDEN
    assert steered.get_nb_trainable_parameters() == (2 * HIDDEN, total)
    steered.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {2 * HIDDEN} || all params: {total:,d}")


def test_layers_expose_their_width(steered):
    assert {(layer.in_features, layer.out_features) for layer in layers_of(steered)} == {(HIDDEN, HIDDEN)}


def test_a_block_without_tokens(tmp_path):
    """As in the small models of PEFT's own tests."""

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(10, 20), torch.nn.Linear(20, 2)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    x, base = torch.randn(9, 10), Small()
    model = get_peft_model(Small(), SteerConfig(target_modules=["first"], hidden_size=20, init_weights=False))
    vector = model.get_parameter("base_model.model.first.steering.steer_vector.default")
    wanted = base.second(torch.relu(base.first(x) + vector))
    assert torch.allclose(model(x), wanted, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(Small(), tmp_path)(x), wanted, atol=1e-6)
