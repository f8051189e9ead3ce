from __future__ import annotations

import pytest
import torch
from conftest import hand_logits, make_model, random_vectors, set_vectors
from peft import LoraConfig, get_peft_model

from steer_adapter import SteerConfig, swap_vector
from steer_adapter.errors import AdapterNameError, ConfigError, VectorError


LAYERS = [1, 2]


def steered(seed=1, layers=LAYERS, **kwargs):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=layers, **kwargs)).eval()
    set_vectors(model, random_vectors(layers, seed=seed))
    return model


@pytest.fixture
def other(tmp_path):
    steered(seed=2, multiplier=-2.0).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def wanted(input_ids):
    return hand_logits(make_model(), input_ids, {k: -2.0 * v for k, v in random_vectors(LAYERS, seed=2).items()})


@pytest.mark.parametrize("native", [False, True])
def test_in_place(other, input_ids, tmp_path, native):
    model = steered()
    if native:
        model.save_pretrained(tmp_path / "first")
        model = make_model()
        model.load_adapter(tmp_path / "first", "default")
    before = {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}
    model.set_multiplier(5.0) if not native else None
    swap_vector(model, "default", other)
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == before
    assert (logits(model, input_ids) - wanted(input_ids)).abs().max() <= 1e-5


def test_compiled_code_stays(other, input_ids):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = steered()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend=counter)
    logits(compiled, input_ids)
    swap_vector(model, "default", other)
    assert (logits(compiled, input_ids) - wanted(input_ids)).abs().max() <= 1e-5
    assert counter.frame_count == 1


def test_what_does_not_fit_changes_nothing(other, input_ids, tmp_path):
    model = steered()
    before = logits(model, input_ids)
    with pytest.raises(AdapterNameError, match=r"received 'nobody', expected one of \['default'\]"):
        swap_vector(model, "nobody", other)
    steered(layers=[1, 3]).save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"differ in .*'layers_to_transform': \(\[1, 3\], \[1, 2\]\)"):
        swap_vector(model, "default", tmp_path / "elsewhere")
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises((ConfigError, TypeError)):
        swap_vector(model, "default", tmp_path / "lora")
    file = other / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(VectorError, match="can't be read as safetensors"):
        swap_vector(model, "default", other)
    file.unlink()
    with pytest.raises(ConfigError, match="without weights beside it"):
        swap_vector(model, "default", other)
    assert torch.equal(logits(model, input_ids), before)


def test_the_record_comes_along(other):
    model = steered(provenance={"method": "bipo", "margins": {"1": {"margin": 2.0}}})
    swap_vector(model, "default", other)
    assert set(model.peft_config["default"].provenance) == {"versions"}, "what was measured of the old one is gone"
