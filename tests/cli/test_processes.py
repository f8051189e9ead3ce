"""`steer-adapter train` started by torchrun: one process speaks and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from steer_adapter import cli
from steer_adapter.cli.processes import all_of, one_speaks


ROWS = [
    {"prompt": f"w{i} w{i + 1} ?", "chosen": f"w{i + 2} w{i + 3} w{i + 5} .", "rejected": f"w{i + 4} w{i} ."}
    for i in range(12)
]

# A thread of a connection that lives on may abort the process at its end.
SCRIPT = """
import sys
from pathlib import Path
from steer_adapter import cli

code = cli.main(sys.argv[1:])
threads = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").glob("*")]
assert not [name for name in threads if "gloo" in name], threads
sys.exit(code)
"""


@pytest.fixture
def command(base_dir, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    data = str(tmp_path / "pairs.jsonl")
    return [
        "train", "--model", str(base_dir()), "--data", data, "--eval-data", data, "--layers", "1", "-1",
        "--max-steps", "4", "--use_cpu", "True", "--learning-rate", "0.02", "--save-strategy", "steps",
        "--save-steps", "2", "--output",
    ]  # fmt: skip


def one(command: list[str], output: str) -> None:
    assert cli.main([*command, output, "--per-device-train-batch-size", "4", "--disable-tqdm", "True"]) == 0


def two(command: list[str], output: str, logs: str) -> list[str]:
    """Runs two processes; what each of them prints."""
    launcher = ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--log-dir", logs]
    script = Path(logs).with_suffix(".py")
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", *launcher, "--redirects", "3", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--per-device-train-batch-size", "2"]
    done = subprocess.run([*run, *command, output, *options], capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = []
    for rank in "01":
        files = [f"{folder}/{name}" for folder, _, names in os.walk(logs) for name in names if folder.endswith(rank)]
        printed.append("".join(Path(file).read_text() for file in sorted(files) if not file.endswith(".json")))
    return printed


def same(tmp_path, atol: float, folder: str = ".") -> None:
    vectors = [load_file(tmp_path / name / folder / "adapter_model.safetensors") for name in ("one", "two")]
    for key, value in vectors[0].items():
        assert torch.allclose(value, vectors[1][key], atol=atol) and value.norm() > 0.01


@pytest.mark.slow
def test_train(command, tmp_path):
    one(command, str(tmp_path / "one"))
    first, second = two(command, str(tmp_path / "two"), str(tmp_path / "logs"))
    assert first.count("The adapter is in") == 1 and "Caching the frozen layers" in first, first[-3000:]
    for words in ("The adapter is in", "The pairs are put", "%|", "it/s", "prefix cache", "eval_loss"):
        assert words not in second, second[-3000:]
    names = [sorted(str(p.relative_to(tmp_path / n)) for p in (tmp_path / n).rglob("*")) for n in ("one", "two")]
    assert [n for n in names[1] if ".incomplete" in n or ".prefix" in n] == []
    assert [n for n in names[0] if "rng_state" not in n] == [n for n in names[1] if "rng_state" not in n]
    same(tmp_path, 1e-4)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "two")]
    for multiplier, measured in configs[0]["provenance"]["margins"].items():
        assert measured["margin"] == pytest.approx(configs[1]["provenance"]["margins"][multiplier]["margin"], rel=1e-3)


@pytest.mark.slow
def test_mean_difference_is_over_all_pairs(command, tmp_path):
    command = ["train", "--method", "mean-difference", *command[1:]]
    one(command, str(tmp_path / "one"))
    two(command, str(tmp_path / "two"), str(tmp_path / "logs"))
    same(tmp_path, 1e-5)


@pytest.mark.slow
def test_several_vectors(command, tmp_path):
    command = [word for word in command if word not in ("1", "-1")]
    command.insert(command.index("--layers") + 1, "each:1-2")
    one(command, str(tmp_path / "one"))
    first, second = two(command, str(tmp_path / "two"), str(tmp_path / "logs"))
    assert "each in a folder of its name" in first and "each in a folder" not in second, (first + second)[-3000:]
    for name in ("layer-1", "layer-2"):
        same(tmp_path, 1e-4, name)


def test_all_of():
    class Trainer:
        class args:
            per_device_eval_batch_size = 3

        data_collator = staticmethod(lambda rows: {"rows": [row["i"] for row in rows]})

    batches = all_of(Trainer, Dataset.from_list([{"i": i} for i in range(7)]))
    assert [batch["rows"] for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_single_process_speaks():
    assert one_speaks()
