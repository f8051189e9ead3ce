from __future__ import annotations

import pickle
import zipfile

import pytest
import torch
from conftest import HIDDEN

from steer_adapter.errors import ConfigError, VectorError
from steer_adapter.interop.pt import layer_of, read_pt


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vector(tmp_path, dtype):
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.save(vector, tmp_path / "v.pt")
    assert torch.equal(read_pt(tmp_path / "v.pt"), vector.float())
    torch.save(torch.nn.Parameter(vector), tmp_path / "v.pt")
    read = read_pt(tmp_path / "v.pt")
    assert torch.equal(read, vector.float()) and read.dtype == torch.float32 and not read.requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"v": torch.zeros(3)}, "received a dict"),
        ([torch.zeros(3)], "received a list"),
        (torch.zeros(1, 3), r"shape \[1, 3\]"),
        (torch.zeros(0), r"shape \[0\]"),
        (torch.zeros(3, dtype=torch.int64), r"shape \[3\], expected one floating"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinity"),
        (torch.tensor([1e300], dtype=torch.float64), "NaN or infinity"),
        (torch.zeros(1).expand(2**60), "expected one floating|plain|vector"),
        (torch.zeros(3).to_sparse(), "expected a plain one"),
        (torch.zeros(3, device="meta"), "on meta, expected a plain one"),
    ],
)
def test_what_is_no_vector(tmp_path, value, message):
    torch.save(value, tmp_path / "v.pt")
    with pytest.raises(VectorError, match=message):
        read_pt(tmp_path / "v.pt")


def test_nothing_in_the_file_is_run(tmp_path):
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save(Evil(tmp_path / "written"), tmp_path / "v.pt")
        with pytest.raises(VectorError, match="more than tensors, or is damaged") as error:
            read_pt(tmp_path / "v.pt")
        assert "weights_only" not in str(error.value), "torch advises to run the file"
        assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("data", [b"", b"x", b"PK\x03\x04" + bytes(100), b"\x80\x02." + bytes(50)])
def test_what_is_damaged(tmp_path, data):
    (tmp_path / "v.pt").write_bytes(data)
    with pytest.raises(VectorError, match="v.pt"):
        read_pt(tmp_path / "v.pt")


def test_an_archive_that_unpacks_to_more(tmp_path):
    torch.save(torch.zeros(1 << 20), tmp_path / "v.pt")
    with zipfile.ZipFile(tmp_path / "v.pt") as plain, zipfile.ZipFile(tmp_path / "w.pt", "w", 8) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "w.pt").stat().st_size < 20_000
    with pytest.raises(VectorError, match="compressed entries"):
        read_pt(tmp_path / "w.pt")


def test_what_is_not_there_or_too_large(tmp_path):
    with pytest.raises(VectorError, match="there is no file"):
        read_pt(tmp_path / "v.pt")
    with open(tmp_path / "v.pt", "wb") as file:
        file.truncate(1 << 27)
    with pytest.raises(VectorError, match="expected one vector"):
        read_pt(tmp_path / "v.pt")


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("vec_ep20_layer15.pt", None, 15),
        ("vec_ep20_layer15.pt", 15, 15),
        ("layer_3.pt", None, 3),
        ("vector.pt", 7, 7),
        ("vector.pt", -1, -1),
    ],
)
def test_the_layer(name, given, wanted):
    assert layer_of(f"/some/layer99/{name}", given) == wanted


def test_a_layer_that_is_not_known():
    with pytest.raises(ConfigError, match="--layer"):
        layer_of("vector.pt", None)
    with pytest.raises(ConfigError, match="received layer 3, but the file's name says 15"):
        layer_of("vec_layer15.pt", 3)
