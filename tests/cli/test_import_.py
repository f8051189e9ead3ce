from __future__ import annotations

import pytest
import torch
from conftest import HIDDEN, hand_logits, make_model, random_vectors
from peft import PeftModel

from steer_adapter import cli


VECTOR = random_vectors([2])[2]


@pytest.fixture
def file(tmp_path):
    torch.save(VECTOR, tmp_path / "vec_ep20_layer2.pt")
    return tmp_path / "vec_ep20_layer2.pt"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_the_vector_steers_the_output_of_its_layer(file, base_dir, load, input_ids, architecture):
    assert cli.main(["import", str(file), "--model", str(base_dir(architecture)), "--layer", "2"]) == 0
    model = PeftModel.from_pretrained(load(architecture), file.with_suffix(""))
    with torch.no_grad():
        received = model(input_ids).logits
    assert (received - hand_logits(load(architecture), input_ids, {2: VECTOR})).abs().max() <= 1e-5


def test_what_is_recorded(file, base_dir, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["import", str(file), "--model", str(base_dir()), "--output", str(output), "--multiplier", "2"]
    assert cli.main(arguments) == 0
    assert f"steer-adapter inspect {output}" in capsys.readouterr().out
    config = PeftModel.from_pretrained(make_model(), output).peft_config["default"]
    assert config.layers_to_transform == [2] and config.multiplier == 2 and config.task_type == "CAUSAL_LM"
    assert config.base_model_name_or_path == str(base_dir()) and config.provenance["method"] == "imported"
    assert config.provenance["imported_from"]["source"] == file.name
    assert sorted(p.name for p in output.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert cli.main(arguments) == 1 and "--overwrite" in capsys.readouterr().err
    (output / "README.md").write_text("# Mine")
    assert cli.main([*arguments, "--overwrite"]) == 0 and (output / "README.md").read_text() == "# Mine"


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (HIDDEN + 1, [], "received a vector of size 33, but the hidden size"),
        (HIDDEN, ["--layer", "4"], "file's name says 2"),
        (HIDDEN, ["--multiplier", "nan"], "finite"),
        (HIDDEN, ["--model", "./nowhere"], "no folder"),
    ],
)
def test_bad_input_is_1_and_writes_nothing(file, base_dir, tmp_path, size, options, message, capsys):
    torch.save(torch.zeros(size), file)
    assert cli.main(["import", str(file), "--model", str(base_dir()), *options]) == 1
    assert message in capsys.readouterr().err
    assert not file.with_suffix("").exists()
