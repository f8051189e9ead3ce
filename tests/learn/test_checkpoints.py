from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steer_adapter.errors import OutputError
from steer_adapter.learn.checkpoints import damage, last_complete, written_beside


def write(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    save_file({"v": torch.ones(4)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({"step": step}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def test_whole_or_not_there(tmp_path):
    for step in (2, 10):
        with written_beside(tmp_path, f"checkpoint-{step}", True) as beside:
            write(beside / f"checkpoint-{step}", step)
            assert not (tmp_path / f"checkpoint-{step}").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"


def test_a_full_disk_leaves_what_was_there(tmp_path):
    write(tmp_path / "checkpoint-2", 2)
    message = r"No space left.*resume from .*checkpoint-2"
    with pytest.raises(OutputError, match=message), written_beside(tmp_path, "checkpoint-4", True) as beside:
        (beside / "checkpoint-4").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"] and damage(tmp_path / "checkpoint-2") is None


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), written_beside(tmp_path, "checkpoint-1", True):
        raise RuntimeError("something else")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty"])
def test_incomplete_ones_are_passed_by(tmp_path, name, harm, caplog):
    for step in (2, 4):
        write(tmp_path / f"checkpoint-{step}", step)
    file = tmp_path / "checkpoint-4" / name
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2 if harm == "truncated" else 0])
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-4 is passed by" in caplog.text and name in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert last_complete(tmp_path) is None


def test_a_checkpoint_of_a_sharded_run_counts(tmp_path):
    write(tmp_path / "checkpoint-2", 2)
    (tmp_path / "checkpoint-2" / "optimizer.pt").rename(tmp_path / "checkpoint-2" / "optimizer.bin")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / "optimizer.bin").write_bytes(b"cut")
    assert "optimizer.bin can't be read" in damage(tmp_path / "checkpoint-2")


def test_a_checkpoint_of_deepspeed_counts(tmp_path):
    write(tmp_path / "checkpoint-2", 2)
    folder = tmp_path / "checkpoint-4"
    write(folder, 4)
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()
    (folder / "latest").write_text("global_step4")
    assert "no global_step4" in damage(folder)
    (folder / "global_step4").mkdir()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    torch.save({"step": 4}, folder / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert last_complete(tmp_path) == folder
    (folder / "latest").write_text("../checkpoint-2")
    assert "no checkpoint-2" in damage(folder)
    (folder / "latest").write_text("global_step4")
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    assert "adapter_model.safetensors can't be read" in damage(folder)
