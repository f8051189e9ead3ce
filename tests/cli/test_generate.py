from __future__ import annotations

import json

import pytest
from conftest import make_model, make_tokenizer, random_vectors, set_vectors
from peft import LoraConfig, get_peft_model

from steer_adapter import SteerConfig, cli
from steer_adapter.cli.generate import answers, encode


@pytest.fixture
def adapter_dir(load, tmp_path):
    model = get_peft_model(load(), SteerConfig(layers_to_transform=[1, 3], task_type="CAUSAL_LM"))
    set_vectors(model, random_vectors([1, 3]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def printed(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_one_answer_a_multiplier(adapter_dir, capsys):
    argv = ["generate", "--adapter", str(adapter_dir), "--prompt", "w1 w2", "--max-new-tokens", "6"]
    assert cli.main([*argv, "--multiplier", "-2", "-0.5", "0", "1", "2"]) == 0
    lines = printed(capsys)
    assert [line.split("]")[0] for line in lines] == ["[-2", "[-0.5", "[+0", "[+1", "[+2"]
    assert len({line.split("]")[1] for line in lines}) > 2, "the dial does something"


def test_on_another_model_of_the_same_shape(adapter_dir, base_dir, tmp_path, capsys):
    make_model(seed=5).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    argv = ["generate", "--adapter", str(adapter_dir), "--prompt", "w1 w2", "--multiplier", "1"]
    assert cli.main(argv) == 0
    own = printed(capsys)
    assert cli.main([*argv, "--model", str(tmp_path / "other")]) == 0
    assert printed(capsys) != own


def test_a_batch_equals_its_prompts_alone(load):
    tokenizer, model = make_tokenizer(), get_peft_model(load(), SteerConfig(layers_to_transform=1))
    set_vectors(model, random_vectors([1]))
    prompts, options = ["w1 w2 w3 w4 ?", "w9"], dict(max_new_tokens=5, min_new_tokens=5)
    for chat in (True, False):
        together = dict(answers(model, tokenizer, encode(tokenizer, prompts, chat, None), [-1, 1], **options))
        for index, prompt in enumerate(prompts):
            alone = dict(answers(model, tokenizer, encode(tokenizer, [prompt], chat, None), [-1, 1], **options))
            assert {m: texts[index] for m, texts in together.items()} == {m: texts[0] for m, texts in alone.items()}


def test_sampling_follows_the_seed(adapter_dir, capsys):
    argv = ["generate", "--adapter", str(adapter_dir), "--prompt", "w1", "--multiplier", "1", "--sample"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert cli.main([*argv, "--seed", seed]) == 0
        outputs.append(printed(capsys))
    assert outputs[0] == outputs[1] != outputs[2]


def test_bad_input(adapter_dir, tmp_path, capsys):
    def error(*argv):
        assert cli.main(["generate", "--prompt", "w1", *argv]) == 1
        return capsys.readouterr().err

    assert "a path where there is no folder" in error("--adapter", "./nothing")
    assert "Can't find 'adapter_config.json'" in error("--adapter", "nothing")
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert "expected a steering vector" in error("--adapter", str(tmp_path / "lora"))
    config = adapter_dir / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    assert "does not name its base model" in error("--adapter", str(adapter_dir))
    weights = adapter_dir / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert "cut short" in error("--adapter", str(adapter_dir), "--model", str(tmp_path / "base"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["generate", "--prompt", "w1"])
    assert exit_.value.code == 2
