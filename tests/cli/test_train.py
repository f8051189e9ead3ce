from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from steer_adapter import cli, verify
from steer_adapter.cli.train import parse
from steer_adapter.learn.mean_difference import fit_mean_difference
from steer_adapter.sharing.loading import load_adapters


FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "run.yaml")
ROWS = [
    {"question": f"w{i} w{i + 1} ?", "good": f"w{i + 2} w{i + 3} w{i + 5} .", "bad": f"w{i + 4} w{i} ."}
    for i in range(10)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture
def argv(base_dir, data, tmp_path):
    columns = ["--prompt-column", "question", "--chosen-column", "good", "--rejected-column", "bad"]
    return [
        "train", "--model", str(base_dir()), "--data", str(data), *columns, "--layers", "1", "-1",
        "--output", str(tmp_path / "out"), "--max-steps", "3", "--use_cpu", "True", "--disable-tqdm", "True",
    ]  # fmt: skip


def vectors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_train(argv, tmp_path, capsys):
    assert cli.main([*argv, "--eval-data", argv[argv.index("--data") + 1], "--multiplier", "0.5"]) == 0
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {*FILES, "margins.png"}
    config = PeftConfig.from_pretrained(out)
    assert (config.layers_to_transform, config.multiplier, config.task_type) == ([1, 3], 0.5, "CAUSAL_LM")
    assert config.base_model_name_or_path == argv[argv.index("--model") + 1]
    assert all(vector.abs().sum() > 0 for vector in vectors(out).values())
    assert verify(PeftModel.from_pretrained(make_model(), out))
    captured = capsys.readouterr()
    assert "eval_loss_positive" in captured.out and "chat template" in captured.err
    assert f"steer-adapter generate --adapter {out}" in captured.out


def test_on_a_lora_the_hint_names_it(argv, base_dir, load, tmp_path, capsys):
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load(), lora).save_pretrained(tmp_path / "lora")
    argv[argv.index("--model") + 1] = str(tmp_path / "lora")
    assert cli.main(argv) == 0
    hint = f"--adapter {tmp_path / 'out'} --model {tmp_path / 'lora'} --prompt"
    assert hint in capsys.readouterr().out
    assert list(vectors(tmp_path / "out")) == [
        f"base_model.model.model.layers.{layer}.steering.steer_vector" for layer in (1, 3)
    ]
    outputs = []
    for model in ([], ["--model", str(tmp_path / "lora")]):
        generate = ["generate", "--adapter", str(tmp_path / "out"), "--prompt", "w1 w2", "--multiplier", "1", *model]
        assert cli.main(generate) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] != outputs[1], "with and without the LoRA"


def test_a_vector_for_each_layer_is_the_one_trained_alone(argv, tmp_path, capsys):
    at, data = argv.index("--layers"), argv[argv.index("--data") + 1]
    search = [*argv[:at], "--layers", "each:1-3", *argv[at + 3 :], "--eval-data", data]
    assert cli.main(search) == 0
    captured = capsys.readouterr()
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"layer-1", "layer-2", "layer-3"}
    table = [line.split() for line in captured.out.splitlines() if line.startswith(("vector", "layer-"))]
    assert [row[0] for row in table] == ["vector", "layer-1", "layer-2", "layer-3"] and "-" not in table[2]
    alone = [*argv[:at], "--layers", "2", "--output", str(tmp_path / "alone"), *argv[at + 5 :]]
    assert cli.main(alone) == 0
    again = ["train", "--config", str(out / "layer-2" / "run.yaml"), "--output", str(tmp_path / "again")]
    assert cli.main([*again, "--disable-tqdm", "True"]) == 0
    (wanted,) = vectors(tmp_path / "alone").values()
    assert wanted.norm() > 0
    for folder in (out / "layer-2", tmp_path / "again"):
        (received,) = vectors(folder).values()
        assert torch.allclose(received, wanted, rtol=0, atol=1e-6)
    assert {path.name for path in (out / "layer-2").iterdir()} == {*FILES, "margins.png"}
    models = make_model()
    assert set(load_adapters(models, out).peft_config) == {"layer-1", "layer-2", "layer-3"}


def test_several_behaviors_and_what_is_done_is_kept(argv, data, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({**row, "good": row["bad"], "bad": row["good"]}) for row in ROWS[:6]))
    argv.insert(argv.index("--data") + 2, str(other))
    assert cli.main(argv) == 0
    out = tmp_path / "out"
    first, second = (vectors(out / name) for name in ("pairs", "other"))
    assert all(not torch.equal(first[key], second[key]) for key in first)
    for path in (out / "other").iterdir():
        path.unlink()
    before = (out / "pairs" / "adapter_model.safetensors").stat().st_mtime_ns
    assert cli.main([*argv, "--resume_from_checkpoint", "last"]) == 0
    assert (out / "pairs" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert "there already" in capsys.readouterr().err
    for key, vector in vectors(out / "other").items():
        assert torch.equal(vector, second[key])


def test_a_checkpoint_is_of_one_vector(argv, tmp_path, capsys):
    at = argv.index("--layers")
    options = ["--layers", "each:1-2", *argv[at + 3 :], "--resume_from_checkpoint", "a/checkpoint-1"]
    assert cli.main([*argv[:at], *options]) == 1
    assert "expected 'last'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_seed_decides(argv, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        argv[argv.index("--output") + 1] = str(tmp_path / name)
        assert cli.main([*argv, "--seed", seed]) == 0
    a, b, c = (torch.stack(list(vectors(tmp_path / name).values())) for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_mean_difference(argv, tmp_path, monkeypatch):
    seen = {}

    def spy(model, batches, name):
        seen["vectors"] = fit_mean_difference(model, batches, name)

    monkeypatch.setattr("steer_adapter.cli.train.fit_mean_difference", spy)
    assert cli.main([*argv, "--method", "mean-difference"]) == 0
    for (_, saved), wanted in zip(sorted(vectors(tmp_path / "out").items()), seen["vectors"].values(), strict=True):
        assert torch.equal(saved, wanted) and wanted.abs().sum() > 0


def test_options_from_a_file(argv, tmp_path):
    options = {"beta": 0.25, "layers": [2], "max_steps": 2, "learning_rate": 0.5}
    (tmp_path / "run.yaml").write_text(json.dumps(options))
    del argv[argv.index("--layers") : argv.index("--output")]
    arguments, config, _ = parse([*argv[1:], "--config", str(tmp_path / "run.yaml")])
    assert (arguments.layers, config.beta, config.learning_rate) == ([2], 0.25, 0.5)
    assert config.max_steps == 3, "the command line wins"


def test_a_recipe_below_the_file_and_the_command_line(argv, tmp_path):
    (tmp_path / "run.yaml").write_text("weight_decay: 0.01")
    recipe = ["--recipe", "bipo-persona-llama2"]
    _, config, _ = parse([*argv[1:], *recipe, "--config", str(tmp_path / "run.yaml"), "--beta", "0.3"])
    assert (config.learning_rate, config.num_train_epochs, config.warmup_steps) == (5e-4, 20, 100)
    assert (config.weight_decay, config.beta) == (0.01, 0.3)


def test_a_recipe_in_the_file_is_not_passed_over(argv, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("recipe: bipo-truthfulqa")
    with pytest.raises(SystemExit) as exit_:
        parse([*argv[1:], "--config", str(tmp_path / "run.yaml")])
    assert exit_.value.code == 2 and "expected on the command line" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--method", "magic"], ["--layers", "x"], ["--max-steps", "many"], ["--config", "/no/f"]]
)
def test_wrong_usage_is_2(argv, options, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*argv, *options])
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "./no/such/model", "a path where there is no folder"),
        ("--data", "./no-such.csv", "a path where there is no file"),
        ("--layers", "44", "expected values from -4 to 3"),
        ("--prompt-column", "prompt", "missing"),
        ("--multiplier", "nan", "finite"),
    ],
)
def test_bad_input_is_1_and_writes_nothing(argv, tmp_path, option, value, message, capsys):
    if option in argv:
        position = argv.index(option)
        del argv[position : position + (3 if option == "--layers" else 2)]
    assert cli.main([*argv, option, value]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_something(argv, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert cli.main(argv) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*argv, "--overwrite"]) == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_an_interrupted_run_leaves_no_adapter(argv, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("steer_adapter.learn.bipo.BiPOTrainer.train", interrupt)
    assert cli.main(argv) == 130
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_run_goes_on_from_a_checkpoint(argv, tmp_path):
    argv[argv.index("--max-steps") + 1] = "4"
    assert cli.main([*argv, "--save-strategy", "steps", "--save-steps", "2"]) == 0
    whole = vectors(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    assert cli.main([*argv, "--resume-from-checkpoint", str(checkpoint)]) == 0
    assert all(torch.equal(value, whole[key]) for key, value in vectors(tmp_path / "out").items())


def test_the_run_file_makes_the_same_vector(argv, tmp_path, monkeypatch):
    data = argv[argv.index("--data") + 1]
    options = ["--eval-data", data, "--seed", "9", "--beta", "0.3", "--license", "mit", "--behavior", "a test"]
    monkeypatch.chdir(tmp_path)
    argv[argv.index("--output") + 1] = "out"  # paths are written whole
    assert cli.main([*argv, *options]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for method in ([], ["--method", "mean-difference"]):
        again = ["--output", str(tmp_path / f"again{len(method)}"), "--config", str(tmp_path / "out" / "run.yaml")]
        assert cli.main(["train", *again, *method]) == 0
    first, same, other = (vectors(tmp_path / name) for name in ("out", "again0", "again2"))
    assert all(torch.equal(first[key], same[key]) and not torch.equal(first[key], other[key]) for key in first)
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert config.provenance["license"] == "mit" and config.provenance["data"]["source"] == "pairs.jsonl"
    assert set(config.provenance["margins"]) == {"-2", "-1", "1", "2"}
    assert PeftConfig.from_pretrained(tmp_path / "again2").provenance["method"] == "mean-difference"


def test_data_that_have_changed_are_not_trained_on(argv, data, tmp_path, capsys):
    assert cli.main(argv) == 0
    data.write_text("\n".join(map(json.dumps, ROWS[:-1])))
    assert cli.main(["train", "--config", str(tmp_path / "out" / "run.yaml"), "--output", str(tmp_path / "b")]) == 1
    assert "the pairs have the SHA-256" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_held_out_pairs_that_have_changed_are_not_measured_on(argv, tmp_path, capsys):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, ROWS[:4])))
    assert cli.main([*argv, "--eval-data", str(held_out)]) == 0
    held_out.write_text("\n".join(map(json.dumps, ROWS[:3])))
    again = ["train", "--config", str(tmp_path / "out" / "run.yaml"), "--output", str(tmp_path / "b")]
    assert cli.main(again) == 1
    assert "leave out --eval-data-sha256" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_an_edited_card_survives_overwriting(argv, tmp_path, capsys):
    assert cli.main(argv) == 0
    readme = tmp_path / "out" / "README.md"
    assert f"adapter = {str(tmp_path / 'out')!r}" in readme.read_text()
    for text in ("# Mine\n", "---\n{[\n---\n", "---\ntags: 3\n---\n"):
        readme.write_text(text)
        (tmp_path / "out" / "adapter_model.safetensors").unlink()
        assert cli.main([*argv, "--overwrite"]) == 0
        assert readme.read_text() == text and "README.md was edited" in capsys.readouterr().err
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    readme.unlink()
    assert cli.main([*argv, "--overwrite"]) == 0
    assert "# A steering vector" in readme.read_text()
