"""Data parallel: two processes give the vector that one gives with the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from tiny_runs import trainer


SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from conftest import make_model
from tiny_runs import trainer

run = trainer(Path(sys.argv[1]), make_model(), per_device_train_batch_size=2, max_steps=6, save_strategy="steps",
              save_steps=3, prefix_cache=sys.argv[2] == "cached")
run.train()
run.save_model(str(Path(sys.argv[1]) / "final"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cached", ["cached", "uncached"])
def test_two_processes(tmp_path, cached):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend",
        "c10d", "--rdzv_endpoint", "localhost:0", str(tmp_path / "script.py"), str(tmp_path / "two"), cached,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert "prefix cache is off" not in result.stderr
    one = trainer(tmp_path / "one", make_model(), max_steps=6)
    one.train()
    one.save_model(str(tmp_path / "one" / "final"))
    vectors = [load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("one", "two")]
    for key, value in vectors[0].items():
        assert torch.allclose(value, vectors[1][key], atol=1e-4) and value.norm() > 0.1
    assert not (tmp_path / "two" / "out" / ".prefix").exists() or not list(
        (tmp_path / "two" / "out" / ".prefix").rglob("*.safetensors")
    )
    resumed = trainer(tmp_path / "two", make_model(), max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "out" / "checkpoint-3"))
    for name, parameter in resumed.model.named_parameters():
        if "steer_vector" in name:
            (wanted,) = vectors[0].values()
            assert torch.allclose(parameter, wanted, atol=1e-4)
