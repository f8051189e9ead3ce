from __future__ import annotations

import copy
import errno
import shutil

import pytest
import torch
from conftest import make_model

from steer_adapter.errors import OutputError
from steer_adapter.learn import cache as module
from steer_adapter.learn.cache import Entry, StateCache, fingerprint, pair_key


def entry(seed: int, tokens: int = 5, dtype: torch.dtype = torch.float32) -> Entry:
    generator = torch.Generator().manual_seed(seed)
    return Entry(
        torch.randn(tokens, 8, generator=generator).to(dtype), torch.randn(2, generator=generator, dtype=torch.float64)
    )


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def same(one: Entry | None, other: Entry) -> bool:
    return one is not None and torch.equal(one.states, other.states) and torch.equal(one.reference, other.reference)


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_run_finds_what_is_kept(tmp_path, small_files, dtype):
    entries = [entry(i, 3 + i % 5, dtype) for i in range(40)]
    first = StateCache(tmp_path / "kept", 0, tmp_path)
    for i, value in enumerate(entries):
        first.put(key(i), value)
    assert all(same(first.get(key(i)), value) for i, value in enumerate(entries))
    first.close()
    assert len(list((tmp_path / "kept").iterdir())) > 1
    second = StateCache(tmp_path / "kept", 0, tmp_path)
    assert len(second) == 40 and all(same(second.get(key(i)), value) for i, value in enumerate(entries))
    assert second.get(key(99)) is None and key(99) not in second


def test_memory_first_and_then_files_that_are_gone_at_the_end(tmp_path, small_files):
    cache = StateCache(None, 2000, tmp_path)
    for i in range(10):
        cache.put(key(i), entry(i))
    assert list(tmp_path.iterdir()) == [], "10 times 160 bytes"
    for i in range(10, 200):
        cache.put(key(i), entry(i))
        assert cache._held_bytes <= 2000 + 160
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) > 5
    assert all(same(cache.get(key(i)), entry(i)) for i in range(200))
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_another_process_sees_new_files(tmp_path):
    one, two = (StateCache(tmp_path / "kept", 0, tmp_path) for _ in range(2))
    one.put(key(1), entry(1))
    one.flush()
    assert key(1) not in two
    two.look_again()
    assert same(two.get(key(1)), entry(1))


@pytest.mark.parametrize("harm", ["truncate", "garbage", "format", "flip"])
def test_what_is_damaged_is_computed_again(tmp_path, harm, caplog):
    cache = StateCache(tmp_path, 0, tmp_path)
    cache.put(key(1), entry(1))
    cache.close()
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if harm == "truncate":
        content = content[:-50]
    elif harm == "garbage":
        content = bytearray(b"\x00" * 500)
    elif harm == "format":
        content = content.replace(b'"format":"2"', b'"format":"0"')
    else:
        content[-20] ^= 1
    file.write_bytes(content)
    again = StateCache(tmp_path, 0, tmp_path)
    assert again.get(key(1)) is None and key(1) not in again
    assert "computed again" in caplog.text
    again.put(key(1), entry(1))
    again.close()
    assert same(StateCache(tmp_path, 0, tmp_path).get(key(1)), entry(1))


def test_too_little_room_is_said_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**9 // 2))
    cache = StateCache(None, 10**9, tmp_path)
    cache.check_room(10**9)
    with pytest.raises(OutputError, match=r"needs 2 GB, and the disk has 0.5 GB free"):
        cache.check_room(2 * 10**9)
    with pytest.raises(OutputError, match="needs 0.6 GB"):
        StateCache(tmp_path / "kept", 10**9, tmp_path).check_room(6 * 10**8)


def test_a_full_disk(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    cache = StateCache(tmp_path, 0, tmp_path)
    cache.put(key(1), entry(1))
    with pytest.raises(OutputError, match="No space left on device"):
        cache.flush()
    assert list(tmp_path.iterdir()) == [] and same(cache.get(key(1)), entry(1))


def test_keys_tell_texts_and_prompts_apart():
    keys = {
        pair_key([1, 2, 3], [1, 2], (1, 1)), pair_key([1, 2], [3, 1, 2], (1, 1)), pair_key([1, 2, 3], [1, 2], (2, 1)),
        pair_key([1, 2, 4], [1, 2], (1, 1)), pair_key([1, 2], [1, 2, 3], (1, 1)),
    }  # fmt: skip
    assert len(keys) == 5 and pair_key([1, 2, 3], [1, 2], (1, 1)) in keys


def test_the_fingerprint_tells_models_apart():
    def frozen(**changes):
        return copy.deepcopy(make_model(**changes)).requires_grad_(False)

    changed = frozen()
    changed.model.layers[3].mlp.down_proj.weight.data[0, 0] += 1e-3
    other_config = frozen()
    other_config.config.rms_norm_eps = 0.1
    names = {
        fingerprint(frozen(), layer=1), fingerprint(frozen(), layer=2), fingerprint(frozen(seed=1), layer=1),
        fingerprint(frozen().bfloat16(), layer=1), fingerprint(changed, layer=1), fingerprint(other_config, layer=1),
    }  # fmt: skip
    assert len(names) == 6 and fingerprint(frozen(), layer=1) in names
