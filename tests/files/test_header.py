from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from steer_adapter.errors import VectorError
from steer_adapter.files.header import MAX_HEADER, Entry, read_header


def write(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def described(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_safetensors_writes_is_read(tmp_path):
    tensors = {"a": torch.zeros(3, 2), "b": torch.ones(5, dtype=torch.bfloat16), "none": torch.zeros(0)}
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    entries = read_header(tmp_path / "f")
    assert {key: (e.dtype, e.shape) for key, e in entries.items()} == {
        "a": ("F32", (3, 2)),
        "b": ("BF16", (5,)),
        "none": ("F32", (0,)),
    }


def test_an_entry(tmp_path):
    assert read_header(write(tmp_path / "f", {"a": described()}, bytes(8))) == {"a": Entry("F32", (2,), 0, 8)}


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"a": described()}, 7, "its tensors take 8 bytes, but 7 follow"),
        ({"a": described()}, 9, "its tensors take 8 bytes, but 9 follow"),
        ({"a": described(), "b": described()}, 8, "overlap or leave a gap"),
        ({"a": described(offsets=(4, 12))}, 12, "overlap or leave a gap"),
        ({"a": described(offsets=(8, 0))}, 8, "does not fill"),
        ({"a": described(shape=(3,))}, 8, "does not fill"),
        ({"a": described(shape=(-2, -1))}, 8, "the shape"),
        ({"a": described(shape=(2.0,))}, 8, "the shape"),
        ({"a": described(shape=(True, 2))}, 8, "the shape"),
        ({"a": described(shape=(1,) * 9)}, 4, "the shape"),
        ({"a": described(shape=(2**63,))}, 8, "the shape"),
        ({"a": described(offsets=(0, 8, 8))}, 8, "the offsets"),
        ({"a": described(dtype="F31")}, 8, "the dtype 'F31'"),
        ({"a": described(dtype=["F32"])}, 8, "the dtype"),
        ({"a": {**described(), "more": 1}}, 8, "is not described"),
        ({"a": []}, 8, "is not described"),
        ({"__metadata__": {"a": 1}}, 0, "metadata"),
        (b'{"a": 1, "a": 2}', 0, "stands there twice"),
        (b"[]", 0, "expected an object"),
        (b"{" * 100_000, 0, "can't be read as"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path, header, body, message):
    with pytest.raises(VectorError, match=message):
        read_header(write(tmp_path / "f", header, bytes(body)))


@pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("<Q", 1), struct.pack("<Q", 2**63) + bytes(100)])
def test_files_cut_short(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(VectorError, match="fewer than its header says.*cut short"):
        read_header(tmp_path / "f")


def test_a_large_header_is_not_read(tmp_path):
    with open(tmp_path / "f", "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)
    with pytest.raises(VectorError, match=f"expected {MAX_HEADER} at most"):
        read_header(tmp_path / "f")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing"):
        with pytest.raises(VectorError, match="can't be read as safetensors"):
            read_header(path)
