from __future__ import annotations

import json

import pytest
from conftest import HIDDEN, make_model
from tiny_runs import trainer

from steer_adapter import cli
from steer_adapter.data import load_pairs
from steer_adapter.learn.shortcut import lengths


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"w{i} ?", "chosen": f"w{i + 2} w{i + 3} .", "rejected": f"w{i + 4} ."} for i in range(10)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "pairs.jsonl")


def printed(capsys, *arguments):
    assert cli.main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_for_programs(base_dir, data, tmp_path, capsys):
    report = printed(capsys, "--model", str(base_dir()), "--data", data, "--layers", "1", "--chat", "off")
    assert report["shape"]["weights"] == sum(p.nbytes for p in make_model().parameters())
    sizes = list(lengths(trainer(tmp_path, make_model(), train_dataset=load_pairs(data)).train_dataset, 1024))
    assert (report["pairs"], report["states"], report["longest_pair"]) == (10, sum(sizes), max(sizes))
    assert report["cache"] == sum(sizes) * HIDDEN * 4 > 10 * HIDDEN * 4
    assert report["dtype"] == "float32" and set(report["needs"]) == {"one", "parallel", "sharded"}
    half = printed(capsys, "--model", str(base_dir()), "--data", data, "--dtype", "bfloat16", "--chat", "off")
    assert half["shape"]["weights"] * 2 == report["shape"]["weights"] and half["layers"] == [[2]]


def test_several_vectors(base_dir, data, capsys):
    one, three = (
        printed(capsys, "--model", str(base_dir()), "--data", data, "--layers", layers) for layers in ("1", "each:1-3")
    )
    assert three["layers"] == [[1], [2], [3]] and three["cache"] == 3 * one["cache"]
    assert three["shape"] == one["shape"] and three["needs"]["one"]["host"] == 3 * one["needs"]["one"]["host"]
    assert three["needs"]["one"]["device"] == one["needs"]["one"]["device"]


def test_a_config_alone(base_dir, data, tmp_path, capsys):
    (tmp_path / "config.json").write_text((base_dir() / "config.json").read_text())
    arguments = ["--model", str(tmp_path / "config.json"), "--data", data]
    assert cli.main(["plan", *arguments]) == 1
    assert "no tokenizer" in capsys.readouterr().err
    arguments += ["--tokenizer", str(base_dir())]
    plain, chat = (printed(capsys, *arguments, "--chat", chat)["states"] for chat in ("off", "on"))
    assert chat > plain


def test_for_people(base_dir, data, capsys):
    assert cli.main(["plan", "--model", str(base_dir()), "--data", data, "--processes", "2"]) == 0
    text = capsys.readouterr().out
    for words in ("10 pairs", "one process", "data parallel, 2 processes", "sharded, 2 processes", "each device"):
        assert words in text


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "./nowhere", "no folder"),
        ("--model", "./no/config.json", "no config"),
        ("--data", "./no.jsonl", "no file"),
        ("--layers", "44", "expected values from -4 to 3"),
        ("--layers", "each:2-x", "received 'each:2-x'"),
        ("--processes", "0", "expected at least 1"),
        ("--cache-memory", "nan", "received nan"),
        ("--cache-memory", "-1", "0 or more"),
    ],
)
def test_bad_input_is_1(base_dir, data, option, value, message, capsys):
    arguments = {"--model": str(base_dir()), "--data": data, "--tokenizer": str(base_dir()), option: value}
    assert cli.main(["plan", *(part for pair in arguments.items() for part in pair)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "x"}, "no config of a model"),
        ({"num_attention_heads": 0}, "no config of a model"),
        ({"intermediate_size": -4}, "no causal language model"),
    ],
)
def test_a_config_that_no_model_has(base_dir, data, tmp_path, values, message, capsys):
    config = json.loads((base_dir() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    arguments = ["--model", str(tmp_path / "config.json"), "--tokenizer", str(base_dir()), "--data", data]
    assert cli.main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_tokenizer_that_knows_no_word(base_dir, data, tmp_path, capsys):
    (tmp_path / "config.json").write_text((base_dir() / "config.json").read_text())
    assert cli.main(["plan", "--model", str(tmp_path), "--data", data]) == 1
    error = capsys.readouterr().err
    assert "no tokenizer" in error or "the tokenizer makes" in error
