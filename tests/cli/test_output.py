from __future__ import annotations

import pytest

from steer_adapter.cli.output import check_output, remove_if_empty, written_whole
from steer_adapter.errors import OutputError


def test_new_and_empty_folders(tmp_path):
    assert check_output(tmp_path / "new", overwrite=False) == tmp_path / "new"
    assert check_output(tmp_path, overwrite=False) == tmp_path


def test_a_folder_that_holds_something(tmp_path):
    (tmp_path / "work.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something already.*--overwrite"):
        check_output(tmp_path, overwrite=False)
    assert check_output(tmp_path, overwrite=True) == tmp_path
    with pytest.raises(OutputError, match="received a file"):
        check_output(tmp_path / "work.txt", overwrite=True)


def test_files_arrive_together_and_others_stay(tmp_path):
    (tmp_path / "work.txt").write_text("mine")
    (tmp_path / "a.txt").write_text("old")
    with written_whole(tmp_path) as beside:
        (beside / "a.txt").write_text("new")
        (beside / "sub").mkdir()
        (beside / "sub" / "b.txt").write_text("b")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new" and (tmp_path / "sub" / "b.txt").read_text() == "b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "sub", "work.txt"]


def test_after_an_error_nothing_has_changed(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "out") as beside:
        (beside / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert list((tmp_path / "out").iterdir()) == []


def test_only_an_empty_folder_is_removed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    for name in ("empty", "full", "none"):
        remove_if_empty(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
