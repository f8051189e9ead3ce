"""Data parallel: two processes give the vector that one gives with the same global batch, and share their work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from tiny_runs import trainer

from steer_adapter.learn.prefix_cache import keys_of, one_pair


SCRIPT = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from conftest import make_model
from tiny_runs import trainer
from steer_adapter.cli.processes import end_processes
from steer_adapter.learn.cache import StateCache
from steer_adapter.learn.prefix_cache import keys_of, one_pair

folder, kept = Path(sys.argv[1]), sys.argv[2] == "kept"
run = trainer(folder, make_model(), per_device_train_batch_size=2, max_steps=6, save_strategy="steps", save_steps=3,
              prefix_cache=sys.argv[2] != "uncached", prefix_cache_dir=str(folder / "kept") if kept else None)
seen = dict(directions=[], batches=[], put=[], read=[])
step, put, get = run.compute_loss, StateCache.put, StateCache.get

def compute_loss(model, inputs, *args, **kwargs):
    seen["directions"].append(run._direction)
    pairs = [one_pair(inputs, i) for i in range(len(inputs["input_ids"]) // 2)]
    seen["batches"].append([keys_of(pair)[0].hex() for pair in pairs])
    return step(model, inputs, *args, **kwargs)

def spy_put(self, key, entry):
    if key not in self:
        seen["put"].append(key.hex())
    return put(self, key, entry)

def spy_get(self, key):
    entry = get(self, key)
    seen["read"] += [key.hex()] if entry is not None else []
    return entry

run.compute_loss, StateCache.put, StateCache.get = compute_loss, spy_put, spy_get
run.train()
run.save_model(str(folder / "final"))
(folder / f"seen{{run.args.process_index}}.json").write_text(json.dumps(seen))
del run, step
end_processes()
"""
TORCHRUN = [
    "torch.distributed.run",
    "--nproc_per_node",
    "2",
    "--rdzv_backend",
    "c10d",
    "--rdzv_endpoint",
    "localhost:0",
]
# On a CPU its launcher of several processes is behind the option for several GPUs; `use_cpu` says where they run.
ACCELERATE = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip


def launch(launcher: list[str], *arguments: str) -> str:
    """What two processes print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def vector(folder: Path) -> torch.Tensor:
    (result,) = load_file(folder / "adapter_model.safetensors").values()
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "cached"),
    [(TORCHRUN, "cached"), (TORCHRUN, "kept"), (TORCHRUN, "uncached"), (ACCELERATE, "cached")],
    ids=["torchrun", "torchrun-kept", "torchrun-uncached", "accelerate"],
)
def test_two_processes(tmp_path, launcher, cached):
    (tmp_path / "script.py").write_text(SCRIPT)
    two = tmp_path / "two"
    printed = launch(launcher, str(tmp_path / "script.py"), str(two), cached)
    assert "prefix cache is off" not in printed
    assert sorted(p.name for p in two.glob("seen*.json")) == ["seen0.json", "seen1.json"], "two processes"
    seen = [json.loads((two / f"seen{rank}.json").read_text()) for rank in range(2)]

    one = trainer(tmp_path / "one", make_model(), max_steps=6)
    directions, batches, step = [], [], one.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        directions.append(one._direction)
        batches.append({keys_of(one_pair(inputs, i))[0].hex() for i in range(len(inputs["input_ids"]) // 2)})
        return step(model, inputs, *args, **kwargs)

    one.compute_loss = compute_loss
    one.train()
    one.save_model(str(tmp_path / "one" / "final"))

    wanted, received = vector(tmp_path / "one" / "final"), vector(two / "final")
    assert torch.allclose(wanted, received, atol=1e-4) and wanted.norm() > 0.1
    assert seen[0]["directions"] == seen[1]["directions"] == directions and set(directions) == {1, -1}
    for first, second, both in zip(seen[0]["batches"], seen[1]["batches"], batches, strict=True):
        assert len(first) == len(second) == 2 and {*first, *second} == both
    if cached != "uncached":
        everything = set.union(*batches)
        assert set(seen[0]["put"]) | set(seen[1]["put"]) == everything
        for mine, other in (seen, seen[::-1]):
            # Two pairs are recorded by both, for the comparison with a forward without the cache.
            assert len(set(mine["put"]) & set(other["put"])) <= 2 and len(mine["put"]) < len(everything)
            assert set(mine["read"]) - set(mine["put"]), "what the other recorded"
    assert not list((two / "out").glob(".prefix*")) and bool(list((two / "kept").rglob("*.safetensors"))) == (
        cached == "kept"
    )

    resumed = trainer(two, make_model(), max_steps=6)
    resumed.train(resume_from_checkpoint=str(two / "out" / "checkpoint-3"))
    for name, parameter in resumed.model.named_parameters():
        if "steer_vector" in name:
            assert torch.allclose(parameter, wanted, atol=1e-4)
