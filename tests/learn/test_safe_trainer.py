"""Runs that are cut short, and runs that go astray."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from tiny_runs import pairs, trainer

from steer_adapter.errors import DivergenceError, OutputError
from steer_adapter.learn import safe_trainer


SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from conftest import make_model
from tiny_runs import trainer

run = trainer(Path(sys.argv[1]), make_model(), save_strategy="steps", save_steps=2, max_steps=60, save_total_limit=3)
print("ready", flush=True)
run.train(resume_from_checkpoint=True)
run.save_model(str(Path(sys.argv[1]) / "final"))
"""
KILLS = int(os.environ.get("STEER_ADAPTER_KILLS", "10"))


def start(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stops, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    began = time.time()
    assert process.wait() == 0
    return folder, time.time() - began


@pytest.mark.slow
def test_killed_at_random_moments_the_vector_is_bitwise_the_same(tmp_path, whole):
    (folder, length), cut = whole, tmp_path / "cut"
    draw, kills = random.Random(int(os.environ.get("STEER_ADAPTER_SEED", "0"))), 0
    while kills < KILLS:
        process = start(cut)
        try:
            process.wait(draw.uniform(0, length / 3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:  # done before the last kill: once more from the start
            assert same(folder, cut)
            subprocess.run(["rm", "-r", str(cut)], check=True)
    assert start(cut).wait() == 0
    assert same(folder, cut)


def same(one: Path, other: Path) -> bool:
    wanted, received = final(one), final(other)
    return all(torch.equal(wanted[key], received[key]) for key in wanted) and bool(next(iter(wanted.values())).any())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(tmp_path, whole, number):
    process = start(tmp_path)
    while not (tmp_path / "out" / "checkpoint-4").exists():
        time.sleep(0.001)
    process.send_signal(number)
    assert process.wait() != 0
    assert not (tmp_path / "final").exists()
    assert start(tmp_path).wait() == 0
    assert same(whole[0], tmp_path)


def test_a_full_disk_names_the_checkpoint_to_resume_from(tmp_path, monkeypatch):
    run = trainer(tmp_path, make_model(), save_strategy="steps", save_steps=1, max_steps=4)
    save = run._save_optimizer_and_scheduler

    def full(folder):
        if run.state.global_step == 3:
            raise OSError(28, "No space left on device")
        save(folder)

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OutputError, match=r"checkpoint-3: .*No space left.*resume from .*checkpoint-2"):
        run.train()
    assert sorted(p.name for p in (tmp_path / "out").glob("*check*")) == ["checkpoint-1", "checkpoint-2"]


def test_the_best_checkpoint_is_found_where_it_ends_up(tmp_path):
    run = trainer(
        tmp_path, make_model(), eval_dataset=pairs(), save_strategy="steps", eval_strategy="steps", save_steps=2,
        eval_steps=2, max_steps=6, load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.parent == tmp_path / "out" and best.is_dir()
    assert f'"best_model_checkpoint": "{best}"' in (best / "trainer_state.json").read_text()


def test_a_loss_that_is_not_finite_stops_with_its_rows(tmp_path, monkeypatch):
    run = trainer(
        tmp_path, make_model(), save_strategy="steps", save_steps=1, max_steps=6, per_device_train_batch_size=2
    )
    step, seen = run.compute_loss, []

    def broken(model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"])
        return step(model, inputs, *args, **kwargs) * (float("nan") if len(seen) == 3 else 1)

    monkeypatch.setattr(run, "compute_loss", broken)
    with pytest.raises(
        DivergenceError, match=r"step 3: a loss that is not finite, in a batch of rows \d+, \d+ of"
    ) as info:
        run.train()
    assert "checkpoint-2" in str(info.value)
    rows = [int(word.strip(",")) for word in str(info.value).split(" rows ")[1].split(" of ")[0].split()]
    texts = {tuple(r["prompt_ids"] + r["chosen_ids"]) for r in (run.train_dataset[n - 1] for n in rows)}
    assert (
        texts == {tuple(t[t != 0].tolist()) for t in seen[-1].chunk(2)[0 if run._direction == 1 else 1]}
        or len(texts) == 2
    )


def test_a_loss_that_explodes_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_trainer, "EXPLODED", 2.0)
    run = trainer(tmp_path, make_model(), max_steps=30, beta=100.0, warmup_steps=0)
    with pytest.raises(DivergenceError, match=r"a loss of .*, 2 times what it began with.*checkpoint is none"):
        run.train()


def test_nothing_to_resume_from(tmp_path, caplog):
    run = trainer(tmp_path, make_model(), max_steps=1)
    run.train(resume_from_checkpoint=True)
    assert "starting anew" in caplog.text and run.state.global_step == 1
