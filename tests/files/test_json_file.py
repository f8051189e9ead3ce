from __future__ import annotations

import os

import pytest

from steer_adapter.errors import ConfigError
from steer_adapter.files.json_file import MAX_BYTES, MAX_DEPTH, parse_json, read_json, read_regular, shorten


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, "ü"], "b": null}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, "ü"], "b": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "can't be read as JSON"),
        (b"\xff{}", "can't be read as JSON"),
        (b"[1]", "of type list, expected an object"),
        (b"null", "of type NoneType"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "can't be read as JSON"),
        (nested(MAX_DEPTH + 1), "nested too deep"),
        (nested(300_000), "nested too deep"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ConfigError, match=f"^here: .*{message}"):
        parse_json(text, "here")


def test_the_depth_that_is_just_allowed():
    assert parse_json(nested(MAX_DEPTH), "here").keys() == {"a"}


def test_only_regular_files_of_a_modest_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no regular file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no regular file"):
        read_json("/dev/zero")
    with pytest.raises(ConfigError, match="can't be read"):
        read_json(tmp_path / "nothing")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ConfigError, match=f"received {MAX_BYTES + 1} bytes"):
        read_json(tmp_path / "large")
    assert len(read_regular(tmp_path / "large", MAX_BYTES + 1)) == MAX_BYTES + 1


def test_long_values_are_cut():
    assert shorten("abc") == "'abc'"
    assert len(shorten("x" * 1000)) == 200
    assert shorten(10**300) == f"an integer of {(10**300).bit_length()} bits"
    assert shorten([10**5000]) == "a list with huge integers"
