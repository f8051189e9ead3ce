from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_model, random_vectors
from tiny_runs import LAYER, pairs, trainer

from steer_adapter.learn.carriers import innermost
from steer_adapter.learn.prefix_cache import keys_of, one_pair
from steer_adapter.learn.shared_states import SharedStates
from steer_adapter.learn.shortcut import prefix_cache, share_prompts


def cached_trainer(tmp_path: Path, **options):
    run = trainer(tmp_path, make_model(), vectors={LAYER: 0.3 * random_vectors([LAYER])[LAYER]}, **options)
    model = innermost(run.model)
    share_prompts(run, model)
    return run, prefix_cache(run, model, SharedStates())


def batch_of(run) -> dict[str, torch.Tensor]:
    return run.data_collator([run.train_dataset[i] for i in range(5)])


@pytest.mark.parametrize("direction", [1, -1])
def test_the_loss_at_a_fixed_vector(tmp_path, direction):
    run, cached = cached_trainer(tmp_path)
    run.prefix_cache = cached
    batch = batch_of(run)
    with run._steered(direction):
        run.prefix_cache, wanted = None, run.compute_loss(run.model, batch).item()
        run.prefix_cache = cached
        with run._above(batch) as given:
            received = run.compute_loss(run.model, given).item()
    assert received == pytest.approx(wanted, rel=1e-5)


def test_entries_are_what_the_model_makes(tmp_path):
    run, cached = cached_trainer(tmp_path)
    batch = batch_of(run)
    entry = cached.cache.get(keys_of(batch)[1])
    model = make_model()
    for half, part in ((1, "chosen"), (6, "rejected")):
        length = int(batch["attention_mask"][half].sum())
        with torch.no_grad():
            output = model(batch["input_ids"][half : half + 1, :length], output_hidden_states=True)
        states = output.hidden_states[LAYER + 1][0, :-1]
        stem = int((batch["input_ids"][1] == batch["input_ids"][6]).long().cumprod(0).sum())
        own = entry.states[: len(states)] if part == "chosen" else torch.cat(
            [entry.states[:stem], entry.states[len(entry.states) - len(states) + stem :]]
        )  # fmt: skip
        assert torch.allclose(own, states, atol=1e-5)
        logs = output.logits[0].log_softmax(-1)
        start = int(batch["completion_mask"][half].argmax())
        total = sum(float(logs[t - 1, batch["input_ids"][half, t]]) for t in range(start, length))
        assert float(entry.reference[int(part == "rejected")]) == pytest.approx(total, rel=1e-5)


def test_a_pair_is_itself_alone_or_among_others(tmp_path):
    run, _ = cached_trainer(tmp_path)
    batch = batch_of(run)
    assert [keys_of(one_pair(batch, index))[0] for index in range(5)] == keys_of(batch)
    assert len(set(keys_of(batch))) == 5


def test_pairs_recorded_by_themselves_have_the_same_bits_in_any_order(tmp_path):
    entries = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        run, cached = cached_trainer(tmp_path, max_steps=1)  # not a whole epoch: nothing is recorded beforehand
        assert len(cached.cache) == 2, "those that were tried out"
        cached.ensure(run.data_collator([run.train_dataset[i] for i in order]))
        entries.append([cached.cache.get(key) for key in keys_of(batch_of(run))])
    assert all(torch.equal(a.states, b.states) for a, b in zip(*entries, strict=True))


def test_a_damaged_file_is_noticed_while_training(tmp_path, caplog):
    kept = tmp_path / "kept"
    run = trainer(tmp_path, make_model(), prefix_cache_dir=str(kept))
    run.train()
    wanted = [p.detach().clone() for n, p in run.model.named_parameters() if "steer_vector" in n]
    (file,) = kept.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    for place in range(len(content) - 1000, len(content), 50):
        content[place] ^= 255
    file.write_bytes(content)
    again = trainer(tmp_path, make_model(), prefix_cache_dir=str(kept))
    again.train()
    received = [p.detach().clone() for n, p in again.model.named_parameters() if "steer_vector" in n]
    assert "computed again" in caplog.text
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, received, strict=True))


def test_another_run_records_nothing(tmp_path, monkeypatch):
    kept = str(tmp_path / "kept")
    trainer(tmp_path, make_model(), prefix_cache_dir=kept).train()
    monkeypatch.setattr(
        "steer_adapter.learn.prefix_cache.PrefixCache._record", lambda *_: pytest.fail("recorded once more")
    )
    trainer(tmp_path, make_model(), prefix_cache_dir=kept, max_steps=8).train()


def test_evaluation_takes_part(tmp_path):
    results = []
    for cached in (False, True):
        run = trainer(
            tmp_path, make_model(), prefix_cache=cached, eval_dataset=pairs(5), eval_strategy="steps", eval_steps=2
        )
        run.train()
        results.append([log for log in run.state.log_history if "eval_loss" in log])
    for plain, fast in zip(*results, strict=True):
        for key in ("eval_loss", "eval_loss_positive", "eval_loss_negative", "eval_rewards/margins_negative"):
            assert fast[key] == pytest.approx(plain[key], rel=1e-4, abs=1e-6)
