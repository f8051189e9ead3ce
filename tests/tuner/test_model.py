"""The tuner on a whole model, and beside other tuners."""

from __future__ import annotations

import pytest
import torch
from conftest import HIDDEN, hand_logits, layers_of, make_model, random_vectors, set_vectors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from steer_adapter import SteerConfig, SteerLayer, SteerModel
from steer_adapter.errors import AdapterNameError, ConfigError, ModelError, SteerError, VectorError


pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:You are trying to modify a model with PEFT for a second time"
)
LORA = dict(target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def with_lora(model=None):
    torch.manual_seed(3)
    return get_peft_model(model or make_model(), LoraConfig(**LORA)).eval()


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def close(received, wanted):
    return (received - wanted).abs().max() <= 1e-5


@pytest.fixture
def steered():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[1, 3]))
    set_vectors(model, random_vectors([1, 3]))
    return model


@pytest.fixture
def adapter_dir(steered, tmp_path):
    steered.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


#################
# Plain models #
#################


def test_only_vectors_train_and_nothing_of_the_base_is_renamed():
    base = make_model()
    before, types = base.state_dict(), [type(m) for m in base.modules()]
    model = get_peft_model(base, SteerConfig(layers_to_transform=[1, 3]))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"base_model.model.model.layers.{i}.steering.steer_vector.default" for i in (1, 3)]
    after = {k: v for k, v in base.state_dict().items() if "steer" not in k}
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert [type(m) for n, m in base.named_modules() if "steering" not in n] == types


def test_exactly_one_component_of_a_key_begins_with_the_prefix(steered):
    for key in steered.state_dict():
        if "steer" in key:
            assert sum(part.startswith("steer_") for part in key.split(".")) == 1


def test_the_default_is_every_layer(input_ids):
    model = get_peft_model(make_model(), SteerConfig())
    set_vectors(model, random_vectors([0, 1, 2, 3]))
    assert model.peft_config["default"].layers_to_transform == [0, 1, 2, 3]
    assert close(logits(model, input_ids), hand_logits(make_model(), input_ids, random_vectors([0, 1, 2, 3])))


def test_gradients_reach_the_vector_and_only_it(steered, input_ids):
    steered(input_ids, labels=input_ids).loss.backward()
    with_grad = {name for name, p in steered.named_parameters() if p.grad is not None}
    assert with_grad == {name for name, _ in steered.named_parameters() if "steer_vector" in name}
    assert all(p.grad.abs().max() > 0 for n, p in steered.named_parameters() if n in with_grad)


def test_several_adapters_one_after_another_and_together(steered, input_ids, tmp_path):
    steered.add_adapter("second", SteerConfig(layers_to_transform=[2, 3], multiplier=-0.5))
    first, second = random_vectors([1, 3]), random_vectors([2, 3], seed=7)
    set_vectors(steered, second, "second")
    assert close(logits(steered, input_ids), hand_logits(make_model(), input_ids, first)), "added, not activated"

    steered.set_adapter("second")
    halved = {layer: -0.5 * vector for layer, vector in second.items()}
    assert close(logits(steered, input_ids), hand_logits(make_model(), input_ids, halved))

    steered.base_model.set_adapter(["default", "second"])
    both = {1: first[1], 2: halved[2], 3: first[3] + halved[3]}
    assert close(logits(steered, input_ids), hand_logits(make_model(), input_ids, both))

    steered.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    again.base_model.set_adapter(["default", "second"])
    assert close(logits(again, input_ids), hand_logits(make_model(), input_ids, both))


def test_disabling(steered, input_ids):
    bare, on = logits(make_model(), input_ids), logits(steered, input_ids)
    with steered.disable_adapter():
        assert torch.equal(logits(steered, input_ids), bare)
    assert torch.equal(logits(steered, input_ids), on)


def test_disabling_does_not_make_a_loaded_vector_trainable(adapter_dir):
    model = PeftModel.from_pretrained(make_model(), adapter_dir)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())
    trainable = PeftModel.from_pretrained(make_model(), adapter_dir, is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())


def test_deleting_the_active_adapter(steered, input_ids):
    steered.add_adapter("second", SteerConfig(layers_to_transform=2))
    second = random_vectors([2], seed=7)
    set_vectors(steered, second, "second")
    steered.delete_adapter("default")
    assert steered.active_adapters == ["second"] and list(steered.peft_config) == ["second"]
    assert close(logits(steered, input_ids), hand_logits(make_model(), input_ids, second))
    steered.delete_adapter("second")
    bare = steered.base_model.model  # PeftModel.forward itself needs an active adapter, of any type
    assert torch.equal(logits(bare, input_ids), logits(make_model(), input_ids))
    assert not any("steer_vector" in key for key in steered.state_dict())


def test_deleting_an_inactive_adapter(steered, input_ids):
    before = logits(steered, input_ids)
    steered.add_adapter("second", SteerConfig(layers_to_transform=2, init_weights=False))
    steered.delete_adapter("second")
    assert steered.active_adapters == ["default"]
    assert torch.equal(logits(steered, input_ids), before)


def test_deleting_another_adapter_changes_nothing_of_the_active_ones():
    model = get_peft_model(make_model("gpt2"), SteerConfig(layers_to_transform=[1], init_weights=False))
    for name in ("second", "third"):
        model.add_adapter(name, SteerConfig(layers_to_transform=[1, 2], init_weights=False))
    model.base_model.set_adapter(["default", "third"], inference_mode=True)
    model.merge_adapter(["default"])
    layers = [module for module in model.modules() if isinstance(module, SteerLayer)]
    model.delete_adapter("second")
    assert [layer.merged_adapters for layer in layers] == [["default"], []]
    assert [layer.active_adapters for layer in layers] == [["default", "third"]] * 2
    assert model.base_model.active_adapters == ["default", "third"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.delete_adapter("third")
    assert [layer.merged_adapters for layer in layers] == [["default"], []]
    assert [layer.active_adapters for layer in layers] == [["default"]] * 2


def test_unloading_leaves_no_trace(input_ids):
    base = make_model()
    names, attributes = [n for n, _ in base.named_modules()], set(vars(base))
    keys, bare = list(base.state_dict()), logits(base, input_ids)
    model = get_peft_model(base, SteerConfig(init_weights=False))
    assert not torch.equal(logits(model, input_ids), bare)
    assert model.unload() is base
    assert [n for n, _ in base.named_modules()] == names and list(base.state_dict()) == keys
    assert set(vars(base)) == attributes and not any(m._forward_hooks for m in base.modules())
    assert torch.equal(logits(base, input_ids), bare)


def test_a_vector_that_is_not_finite_is_not_saved(steered, tmp_path):
    set_vectors(steered, {1: torch.full((HIDDEN,), float("inf"))})
    with pytest.raises(VectorError, match="nothing was saved"):
        steered.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_failed_second_adapter_leaves_the_first(steered, input_ids):
    before = logits(steered, input_ids)
    with pytest.raises(ModelError, match="expected values from -4 to 3"):
        steered.add_adapter("second", SteerConfig(layers_to_transform=44))
    assert list(steered.peft_config) == ["default"] and torch.equal(logits(steered, input_ids), before)


@pytest.mark.parametrize("name", ["layers", "1", "steering", "steer_vector"])
def test_a_name_that_is_part_of_a_key(steered, name):
    with pytest.raises(AdapterNameError, match="no part of a module's path"):
        steered.add_adapter(name, SteerConfig(layers_to_transform=[1]))
    assert list(steered.peft_config) == ["default"]


def test_a_vector_is_not_replaced_by_another_of_its_name(steered, adapter_dir, input_ids):
    before = logits(steered, input_ids)
    for again in (
        lambda: get_peft_model(steered, SteerConfig()),
        lambda: PeftModel.from_pretrained(steered, adapter_dir),
    ):
        with pytest.raises(AdapterNameError, match="carries a vector of that name"):
            again()
        assert torch.equal(logits(steered, input_ids), before)
    with pytest.raises(AdapterNameError, match="carries a vector of that name"):
        get_peft_model(steered.base_model.model, SteerConfig(layers_to_transform=[2]))
    assert torch.equal(logits(steered, input_ids), before) and steered.peft_config["default"].layers_to_transform == [
        1,
        3,
    ]


def test_modules_that_another_adapter_saves_under_the_name(adapter_dir, input_ids):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    tuned = get_peft_model(make_model(), config).eval()
    before = logits(tuned, input_ids)
    with pytest.raises(AdapterNameError, match="modules_to_save"):
        PeftModel.from_pretrained(tuned, adapter_dir)
    assert torch.equal(logits(tuned, input_ids), before)
    assert not torch.equal(logits(PeftModel.from_pretrained(tuned, adapter_dir, "happy"), input_ids), before)


@pytest.mark.parametrize("names", ["typo", ["default", "typo"]])
def test_unknown_names_are_not_activated(steered, input_ids, names):
    before = logits(steered, input_ids)
    with pytest.raises(AdapterNameError, match=r"received 'typo', expected one of the vectors \['default'\]"):
        steered.base_model.set_adapter(names)
    assert torch.equal(logits(steered, input_ids), before)


def test_a_second_vector_from_the_config_of_a_loaded_one_is_new(adapter_dir, input_ids):
    model = PeftModel.from_pretrained(make_model(), adapter_dir)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    assert torch.equal(logits(model, input_ids), logits(make_model(), input_ids)), "zero, not about to be loaded"


@pytest.mark.parametrize("name", ["a.b", ""])
def test_a_name_that_can_not_be_a_key(steered, name):
    with pytest.raises(AdapterNameError, match="a name without dots"):
        steered.add_adapter(name, SteerConfig())
    assert list(steered.peft_config) == ["default"]
    model = make_model()
    with pytest.raises(AdapterNameError):
        get_peft_model(model, SteerConfig(), adapter_name=name)
    assert not any("steering" in n for n, _ in model.named_modules())


def test_rows_can_not_choose_adapters_without_a_word(steered, input_ids):
    with pytest.raises(SteerError, match="Cannot pass `adapter_names`"):
        steered(input_ids, adapter_names=["default", "__base__"])
    with pytest.raises(SteerError, match="Cannot pass `adapter_names`"):
        steered.generate(input_ids, adapter_names=["default", "__base__"])


def test_unloading_beside_a_native_lora_keeps_it(adapter_dir, input_ids):
    model = make_model()
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(**LORA), "low_rank")
    before = logits(model, input_ids)
    steered = PeftModel.from_pretrained(model, adapter_dir, adapter_name="happy")
    assert not torch.equal(logits(steered, input_ids), before)
    assert steered.unload() is model
    assert list(model.peft_config) == ["low_rank"] and torch.equal(logits(model, input_ids), before)


def test_disk_offload_is_refused():
    model = make_model()
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(ModelError, match="offloaded to disk"):
        get_peft_model(model, SteerConfig())


def test_low_cpu_mem_usage_puts_vectors_on_meta():
    model = get_peft_model(make_model(), SteerConfig(), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in model.named_parameters() if "steer_vector" in n)
    assert not any(p.is_meta for n, p in model.named_parameters() if "steer_vector" not in n)


##################
# Custom models #
##################


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.other = nn.Linear(6, 6)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.other(x)


def test_target_modules(tmp_path):
    x, vector = torch.randn(2, 5, 6), torch.randn(6)
    model = get_peft_model(Custom(), SteerConfig(target_modules=["blocks.1"], hidden_size=6))
    (name,) = [n for n, _ in model.named_parameters() if "steer_vector" in n]
    assert name == "base_model.model.blocks.1.steering.steer_vector.default"
    with torch.no_grad():
        model.get_parameter(name).copy_(vector)
        base = Custom()
        wanted = base.other(base.blocks[2](base.blocks[1](base.blocks[0](x)) + vector))
        assert close(model(x), wanted)
        model.save_pretrained(tmp_path)
        assert close(PeftModel.from_pretrained(Custom(), tmp_path)(x), wanted)
        assert close(PeftModel.from_pretrained(Custom(), tmp_path, low_cpu_mem_usage=True)(x), wanted)


def test_target_modules_by_regex():
    model = get_peft_model(Custom(), SteerConfig(target_modules=r"blocks\.[02]", hidden_size=6))
    assert [n.split(".")[3] for n, _ in model.named_parameters() if "steer_vector" in n] == ["0", "2"]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (SteerConfig(target_modules=["nothing"], hidden_size=6), ModelError, "matches no module of Custom"),
        (SteerConfig(target_modules=["blocks.1"]), ConfigError, r"expected SteerConfig\(hidden_size="),
        (SteerConfig(target_modules="blocks", hidden_size=6), ModelError, "ModuleList, which no forward runs"),
        (SteerConfig(target_modules="blocks.1(", hidden_size=6), ConfigError, "the regex 'blocks.1\\('"),
        (SteerConfig(), ModelError, "No decoder layers"),
    ],
)
def test_bad_targets(config, error, message):
    model = Custom()
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        get_peft_model(model, config)
    assert list(model.state_dict()) == before


#######################
# Beside other tuners #
#######################


def test_a_lora_added_afterwards_reaches_the_steered_layers(adapter_dir):
    model = make_model()
    model.load_adapter(adapter_dir, "happy")
    model.add_adapter(LoraConfig(**LORA), "low_rank")
    for layer in layers_of(model):
        assert hasattr(layer.self_attn.q_proj, "lora_A") and hasattr(layer.mlp.down_proj, "lora_A")


def test_on_a_lora_only_the_vector_trains():
    tuned = with_lora()
    model = get_peft_model(tuned, SteerConfig(layers_to_transform=1))
    assert [n.rpartition(".steering.")[2] for n, p in model.named_parameters() if p.requires_grad] == [
        "steer_vector.default"
    ]


def test_loading_a_vector_for_inference_does_not_stop_the_training_of_a_lora(adapter_dir):
    model = PeftModel.from_pretrained(with_lora(), adapter_dir)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_each_tuner_keeps_its_own_books(adapter_dir, tmp_path, input_ids):
    tuned = with_lora()
    tuned.save_pretrained(tmp_path / "before")
    before = logits(tuned, input_ids)
    model = PeftModel.from_pretrained(tuned, adapter_dir)
    assert isinstance(tuned.peft_config["default"], LoraConfig)
    assert isinstance(model.peft_config["default"], SteerConfig)
    assert model.unload() is tuned and isinstance(tuned.peft_config["default"], LoraConfig)
    assert torch.equal(logits(tuned, input_ids), before)
    tuned.save_pretrained(tmp_path / "after")
    saved, again = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("before", "after"))
    assert saved.keys() == again.keys() and all(torch.equal(saved[k], again[k]) for k in saved)


def test_disabling_the_vector_leaves_the_lora_on(adapter_dir, input_ids):
    tuned = with_lora()
    wanted = logits(tuned, input_ids)
    model = PeftModel.from_pretrained(tuned, adapter_dir)
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids), wanted)
    assert not torch.equal(logits(model, input_ids), wanted)


def test_merging_the_outer_model_does_not_merge_the_lora_away(adapter_dir, input_ids):
    model = PeftModel.from_pretrained(with_lora(), adapter_dir)
    before = logits(model, input_ids)
    merged = model.merge_and_unload()
    assert any("lora_A" in name for name, _ in merged.named_parameters())
    assert not any("steer" in name for name, _ in merged.named_parameters())
    assert close(logits(merged, input_ids), before)


def test_a_lora_is_merged_past_the_vector(adapter_dir, input_ids):
    tuned = with_lora()
    model = PeftModel.from_pretrained(tuned, adapter_dir)
    before = logits(model, input_ids)
    tuned.merge_adapter()
    assert all(m.merged for m in tuned.modules() if hasattr(m, "lora_A")), "not stopped half-way"
    assert close(logits(model, input_ids), before)
    tuned.unmerge_adapter()
    assert close(logits(model, input_ids), before)


def test_a_vector_of_the_same_name_leaves_the_lora_alone(adapter_dir, input_ids):
    tuned = with_lora().to(torch.bfloat16)
    model = PeftModel.from_pretrained(tuned, adapter_dir, is_trainable=True)
    loras = [p for n, p in model.named_parameters() if "lora_" in n]
    assert all(p.dtype == torch.bfloat16 for p in loras), "casting is for vectors only"
    model.set_adapter("default")
    model.delete_adapter("default")
    assert loras and all(
        p is q for p, q in zip(loras, [p for n, p in model.named_parameters() if "lora_" in n], strict=True)
    )


def test_deleting_natively(adapter_dir, input_ids):
    model = make_model()
    bare = logits(model, input_ids)
    info = model.load_adapter(adapter_dir, "happy")
    assert not info.missing_keys and not info.unexpected_keys
    model.delete_adapter("happy")
    assert torch.equal(logits(model, input_ids), bare)
    assert not any("steer_vector" in key for key in model.state_dict())


def test_a_failed_native_load_leaves_the_other_adapters(adapter_dir, input_ids):
    model = make_model()
    model.add_adapter(LoraConfig(**LORA), "low_rank")
    before = logits(model, input_ids)
    config = SteerConfig(layers_to_transform=77)
    with pytest.raises(ModelError, match="77"):
        model.add_adapter(config, "bad")
    assert list(model.peft_config) == ["low_rank"] and torch.equal(logits(model, input_ids), before)


def test_the_name_of_another_adapter_is_not_taken(adapter_dir):
    model = make_model()
    model.add_adapter(LoraConfig(**LORA))
    with pytest.raises(AdapterNameError, match="received 'default', which the model uses for another adapter"):
        PeftModel.from_pretrained(model, adapter_dir)
    assert isinstance(model.peft_config["default"], LoraConfig)


def test_the_base_model_is_remembered_around_a_lora(load, base_dir):
    model = get_peft_model(with_lora(load()), SteerConfig(layers_to_transform=1))
    assert model.peft_config["default"].base_model_name_or_path == str(base_dir())
    assert isinstance(model.base_model, SteerModel) and any(isinstance(m, SteerLayer) for m in model.modules())
