"""Sharded models: torch's FSDP2 on two gloo processes, alone and as accelerate prepares a trainer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model
from safetensors.torch import load_file
from tiny_runs import trainer

from steer_adapter.errors import ConfigError
from steer_adapter.learn.checkpoints import last_complete
from steer_adapter.learn.processes import agreed, check_processes, gathered, is_sharded


TESTS = str(Path(__file__).parent.parent)
DIRECT = f"""
import os, sys
sys.path.insert(0, {TESTS!r})
import torch, torch.distributed as dist
from conftest import layers_of, make_model, random_vectors, set_vectors
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from steer_adapter import SteerConfig, set_multiplier, steering, verify
from steer_adapter.learn.processes import is_sharded

folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
ids = torch.tensor([[5, 17, 33, 64, 8, 91, 20, 11], [7, 7, 40, 3, 29, 55, 71, 2]])

def make():
    model = get_peft_model(make_model().to(dtype), SteerConfig(layers_to_transform=[1, 2], multiplier=1.5))
    set_vectors(model, random_vectors([1, 2]))
    return model

def vectors(model):
    return [p for n, p in model.named_parameters() if "steer_" in n]

def same(what):
    one, two = what(whole), what(sharded)
    assert torch.equal(one, two), (one - two).abs().max()
    return one

whole, sharded = make(), make()
for layer in layers_of(sharded.base_model.model):
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
assert is_sharded(sharded) and not is_sharded(whole)
assert all(p.to_local().shape == (16,) and p.dtype == torch.float32 for p in vectors(sharded))

steered = same(lambda model: model(ids).logits.detach())
for model in (whole, sharded):
    (model(ids).logits.float() ** 2).mean().backward()
for one, two in zip(vectors(whole), vectors(sharded)):
    assert torch.equal(one.grad, two.grad.full_tensor()) and one.grad.norm() > 0
for model in (whole, sharded):
    torch.optim.AdamW(vectors(model), lr=0.1).step()
trained = same(lambda model: model(ids).logits.detach())
assert not torch.equal(trained, steered)
for model in (whole, sharded):
    set_multiplier(model, -2.0)
assert not torch.equal(same(lambda model: model(ids).logits.detach()), trained)

def by_row(model):
    with steering(model, multiplier=[1.0, -3.0]):
        return model(ids).logits.detach()

def off(model):
    with model.disable_adapter():
        return model(ids).logits.detach()

assert not torch.equal(same(by_row), same(off))
for one, two in zip(verify(whole).arrivals, verify(sharded).arrivals):
    assert one.arrives and two.arrives
    assert abs(one.norm - two.norm) < 1e-5 * one.norm and abs(one.dose - two.dose) < 1e-2
register_fsdp_forward_method(sharded, "generate")
same(lambda model: model.generate(input_ids=ids, max_new_tokens=3, do_sample=False))
state = get_peft_model_state_dict(sharded)
assert all(type(v) is torch.Tensor and torch.equal(v, get_peft_model_state_dict(whole)[k]) for k, v in state.items())
sharded.save_pretrained(f"{{folder}}/sharded", is_main_process=rank == 0)
whole.save_pretrained(f"{{folder}}/whole", is_main_process=rank == 0)
dist.barrier()
files = [load_file(f"{{folder}}/{{name}}/adapter_model.safetensors") for name in ("whole", "sharded")]
assert files[0].keys() == files[1].keys() and all(torch.equal(v, files[1][k]) for k, v in files[0].items())
open(f"{{folder}}/done{{rank}}", "w").close()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # FSDP keeps the threads of connections alive, and they abort the interpreter's end now and then
"""
# accelerate prepares no model for FSDP on a CPU by itself, so it is told that this was asked for.
TRAINER = f"""
import os, sys
sys.path.insert(0, {TESTS!r})
from pathlib import Path
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import make_model
from tiny_runs import trainer
from steer_adapter.learn import head

head.CHUNK = 3  # of which the processes would need more or fewer
folder, resume = Path(sys.argv[1]), sys.argv[2:]
run = trainer(folder, make_model(), per_device_train_batch_size=2, max_steps=6, learning_rate=None,
              save_strategy="steps", save_steps=3)
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
    state_dict_type="FULL_STATE_DICT",
)
plugin.cpu_ram_efficient_loading = True
AcceleratorState._shared_state["fsdp_plugin"] = plugin
for state in (PartialState, AcceleratorState):
    state._shared_state["distributed_type"] = DistributedType.FSDP
run.is_fsdp_enabled = True
from steer_adapter.learn import provenance
measured = provenance.state_norms
provenance.state_norms = lambda run: measured(run) if run.is_world_process_zero() else 1 / 0  # without weights there
run.train(*resume)
names = [type(m).__name__ for m in run.model.modules()]
assert names.count("FSDPLlamaDecoderLayer") == 4 and names[0] == "FSDPPeftModel", names
run.save_model(str(folder / "final"))
if run.is_world_process_zero():
    logged = [entry["vector_norm"] for entry in run.state.log_history if "vector_norm" in entry]
    torch.save([run.args.learning_rate, logged], folder / "logged.pt")
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # FSDP keeps the threads of connections alive, and they abort the interpreter's end now and then
"""


def launch(tmp_path: Path, script: str, *arguments: str) -> str:
    (tmp_path / "script.py").write_text(script)
    launcher = ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(tmp_path / "script.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_model_is_the_whole_one(tmp_path, dtype):
    launch(tmp_path, DIRECT, str(tmp_path), dtype)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


@pytest.mark.slow
def test_training_a_sharded_model(tmp_path):
    printed = launch(tmp_path, TRAINER, str(tmp_path / "two"))
    assert printed.count("The prefix cache is off: the model is sharded.") == 1
    one = trainer(tmp_path / "one", make_model(), max_steps=6, learning_rate=None)
    one.train()
    one.save_model(str(tmp_path / "one" / "final"))
    (wanted,), (received,) = (
        load_file(tmp_path / name / "final" / "adapter_model.safetensors").values() for name in ("one", "two")
    )
    assert torch.allclose(wanted, received, atol=1e-4) and wanted.norm() > 0.1
    (tmp_path / "two" / "final" / "adapter_model.safetensors").unlink()
    launch(tmp_path, TRAINER, str(tmp_path / "two"), str(tmp_path / "two" / "out" / "checkpoint-3"))
    (resumed,) = load_file(tmp_path / "two" / "final" / "adapter_model.safetensors").values()
    assert torch.allclose(wanted, resumed, atol=1e-4)
    assert last_complete(tmp_path / "two" / "out") == tmp_path / "two" / "out" / "checkpoint-6"
    rate, norms = torch.load(tmp_path / "two" / "logged.pt")
    assert rate == one.args.learning_rate
    assert norms == pytest.approx([e["vector_norm"] for e in one.state.log_history if "vector_norm" in e], rel=1e-3)


@pytest.mark.slow
def test_deepspeed(tmp_path, base_dir):
    """By way of the config that is shipped. Some answers are longer than a chunk of logits, in one process only."""
    pytest.importorskip("deepspeed")
    values = yaml.safe_load((Path(TESTS).parent / "examples" / "accelerate" / "zero3.yaml").read_text())
    values |= {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(values))
    words = [" ".join(f"w{(i * k) % 60}" for k in range(320 if i % 3 == 0 else 5)) for i in range(1, 26)]
    rows = [{"prompt": "w1 w2 ", "chosen": f" {words[i]}", "rejected": f" {words[i + 12]}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = [
        "-m", "steer_adapter.cli", "train", "--model", base_dir(), "--data", tmp_path / "pairs.jsonl", "--layers", 1,
        "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--learning_rate", 0.05, "--chat", "off",
        "--per_device_train_batch_size", 2, "--use_cpu", True, "--bf16", False, "--output",
    ]  # fmt: skip
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "zero3.yaml"]

    def run(launcher, output, *more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [str(word) for word in (*launcher, *train, tmp_path / output, *more)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return next(iter(load_file(tmp_path / output / "adapter_model.safetensors").values()))

    sharded = run(accelerate, "sharded")
    parallel = run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"], "parallel")
    assert torch.allclose(sharded, parallel, atol=1e-4) and parallel.norm() > 0.1
    shutil.rmtree(tmp_path / "sharded" / "checkpoints" / "checkpoint-4")
    resumed = run(accelerate, "sharded", "--resume_from_checkpoint", "last")
    assert torch.equal(resumed, sharded)


def test_one_process_goes_by_itself():
    model = torch.nn.Linear(2, 2)
    assert agreed(model, lambda: 3) == 3 and not is_sharded(model)
    with gathered(model):
        assert not model._forward_pre_hooks


def test_processes_that_are_not_joined(monkeypatch, tmp_path):
    check_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes()  # of a scheduler: nothing started this one among others
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="2 processes that don't know of each other.*use_cpu=True"):
        check_processes()
