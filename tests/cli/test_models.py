from __future__ import annotations

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model

from steer_adapter.cli.models import chat_or_plain, check_folder, load_model, load_tokenizer
from steer_adapter.errors import ConfigError, ModelError


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "~/no-such-folder", "a/b/c"])
def test_a_folder_that_does_not_exist(name):
    with pytest.raises(ModelError, match="a path where there is no folder"):
        check_folder(name)


def test_hub_ids_pass():
    check_folder("gpt2")
    check_folder("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_model_and_a_model_with_a_lora(base_dir, tmp_path):
    assert load_model(str(base_dir()), "bfloat16").dtype == torch.bfloat16
    assert load_model(str(base_dir())).dtype == torch.float32
    base = make_model()
    base.name_or_path = str(base_dir())
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert isinstance(load_model(str(tmp_path)), PeftModel)
    assert load_tokenizer(str(tmp_path)).get_vocab() == make_tokenizer().get_vocab()


def test_chat_or_plain():
    with_template, without = make_tokenizer(), make_tokenizer()
    without.chat_template = None
    assert chat_or_plain(with_template, "auto", None) and not chat_or_plain(without, "auto", None)
    assert chat_or_plain(with_template, "on", None) and not chat_or_plain(with_template, "off", None)
    with pytest.raises(ConfigError, match="no chat template"):
        chat_or_plain(without, "on", None)
    with pytest.raises(ConfigError, match="no chat template"):
        chat_or_plain(without, "auto", "Be kind.")
    with pytest.raises(ConfigError, match="--chat off"):
        chat_or_plain(with_template, "off", "Be kind.")
