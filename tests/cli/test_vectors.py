from __future__ import annotations

import pytest
import torch
from conftest import make_model, set_vectors
from peft import get_peft_model

from steer_adapter import SteerConfig
from steer_adapter.cli.vectors import comparison, parse_layers, vectors_of
from steer_adapter.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (["8", "-1"], ([[8, -1]], False)),
        ([8, 9], ([[8, 9]], False)),
        (["each:8-10"], ([[8], [9], [10]], True)),
        (["each:8,3,12-13"], ([[8], [3], [12], [13]], True)),
    ],
)
def test_layers(values, wanted):
    assert parse_layers(values) == wanted


@pytest.mark.parametrize(
    "values",
    [["x"], ["1.5"], [], ["each:"], ["each:8-"], ["each:10-8"], ["each:8,8"], ["each:1", "2"], ["each:0-99999999999"]],
)
def test_layers_that_cannot_be_read(values):
    with pytest.raises(ConfigError, match="--layers: received .* expected"):
        parse_layers(values)


def test_names():
    def names(data, layers):
        return [vector.name for vector in vectors_of(data, layers, None)]

    assert names("a/wealth.csv", ["8", "9"]) == ["."]
    assert names(["a/wealth.csv"], ["each:8-9"]) == ["layer-8", "layer-9"]
    assert names(["a/wealth.csv", "b/power.v2.json"], ["8"]) == ["wealth", "power-v2"]
    assert names(["wealth/train.csv", "/x/power/train.csv"], ["each:8"]) == [
        "wealth-train-layer-8",
        "power-train-layer-8",
    ]
    assert names(["user/wealth", "user/power"], ["8"]) == ["wealth", "power"]
    with pytest.raises(ConfigError, match="differ by their names"):
        vectors_of(["a.csv", "a.csv"], ["8"], None)


def test_held_out_pairs_belong_to_their_data():
    first, second = vectors_of(["a.csv", "b.csv"], ["8"], ["c.csv", "d.csv"])
    assert (first.data, first.eval_data, second.data, second.eval_data) == ("a.csv", "c.csv", "b.csv", "d.csv")
    with pytest.raises(ConfigError, match="received 1 files for 2"):
        vectors_of(["a.csv", "b.csv"], ["8"], ["c.csv"])


def test_the_table(tmp_path):
    for name, norm, margins in (("a", 2.0, {}), ("b", 3.0, {"margin": 1.5, "right_way": 0.75})):
        model = get_peft_model(make_model(), SteerConfig(layers_to_transform=1))
        set_vectors(model, {1: norm * torch.nn.functional.normalize(torch.ones(32), dim=0)})
        if margins:
            model.peft_config["default"].provenance = {"margins": {"1": margins}}
        model.save_pretrained(tmp_path / name)
    header, first, second = (line.split("  ") for line in comparison(tmp_path).splitlines())
    cells = [[cell.strip() for cell in row if cell.strip()] for row in (first, second)]
    assert cells == [["a", "2", "-", "-", "-", "-"], ["b", "3", "-", "-", "+1.5", "75%"]]
    assert header[0].strip() == "vector"
