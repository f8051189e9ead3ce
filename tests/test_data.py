from __future__ import annotations

import json

import pytest
from datasets import Dataset

from steer_adapter.data import as_conversations, check_pairs, check_tokens, load_pairs, token_counts
from steer_adapter.errors import DataError, MissingExtraError


ROWS = [{"prompt": "p1", "chosen": "c1", "rejected": "r1"}, {"prompt": "p2", "chosen": "c2", "rejected": "r2"}]


def write(path, rows):
    if path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_files(tmp_path, suffix):
    assert load_pairs(write(tmp_path / f"pairs{suffix}", ROWS)).to_list() == ROWS


def test_columns_are_renamed_and_others_left_out(tmp_path):
    rows = [{"question": "p1", "matching": "c1", "not_matching": "r1", "topic": "t"}]
    columns = {"prompt": "question", "chosen": "matching", "rejected": "not_matching"}
    assert load_pairs(write(tmp_path / "pairs.csv", rows), columns).to_list() == ROWS[:1]


def test_swapped_columns(tmp_path):
    swapped = load_pairs(write(tmp_path / "pairs.jsonl", ROWS), {"chosen": "rejected", "rejected": "chosen"})
    assert swapped[0] == {"prompt": "p1", "chosen": "r1", "rejected": "c1"}


def test_conversational_files(tmp_path):
    rows = [
        {k: [{"role": "user" if k == "prompt" else "assistant", "content": v}] for k, v in r.items()} for r in ROWS
    ]
    assert load_pairs(write(tmp_path / "pairs.jsonl", rows)).to_list() == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**ROWS[0], "chosen": "  "}], "row 1: `chosen` is '  ', expected text"),
        ([ROWS[0], {**ROWS[1], "prompt": None}], "row 2: `prompt` is None"),
        ([ROWS[0], {**ROWS[1], "rejected": "c2"}], "row 2: `chosen` equals `rejected`"),
        ([{"prompt": "p", "chosen": "c"}], r"\['rejected'\] missing.*--rejected-column"),
        (
            [{"prompt": "p", "chosen": [{"role": "a", "content": ""}], "rejected": [{"role": "a", "content": "x"}]}],
            "row 1",
        ),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_pairs(write(tmp_path / "pairs.jsonl", rows))


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="a path where there is no file"):
        load_pairs(str(tmp_path / "nothing.csv"))
    with pytest.raises(DataError, match="'.txt' file, expected one of"):
        (tmp_path / "pairs.txt").write_text("x")
        load_pairs(str(tmp_path / "pairs.txt"))
    with pytest.raises(DataError, match="an empty file"):
        (tmp_path / "pairs.jsonl").write_text("")
        load_pairs(str(tmp_path / "pairs.jsonl"))
    with pytest.raises(DataError, match="broken.jsonl: it can't be read"):
        (tmp_path / "broken.jsonl").write_text('{"prompt": "a", ')
        load_pairs(str(tmp_path / "broken.jsonl"))
    with pytest.raises(DataError, match="no/such-data: it can't be read"):
        load_pairs("no/such-data")


def test_bad_rows_are_dropped_if_asked_for(tmp_path, caplog):
    path = write(tmp_path / "pairs.jsonl", [{**ROWS[0], "prompt": ""}, ROWS[1], {**ROWS[0], "rejected": "c1"}])
    with pytest.raises(DataError, match="row 1: `prompt` is ''.*--drop-bad-pairs"):
        load_pairs(path)
    assert load_pairs(path, drop_bad=True).to_list() == ROWS[1:]
    assert "2 of 3 pairs" in caplog.text
    with pytest.raises(DataError, match="no rows"):
        load_pairs(write(tmp_path / "bad.jsonl", [{**ROWS[0], "prompt": ""}]), drop_bad=True)


def test_no_rows():
    with pytest.raises(DataError, match="My data: received no rows"):
        check_pairs([], "My data")


def test_as_conversations():
    received = as_conversations(Dataset.from_list(ROWS[:1]), "Be kind.")[0]
    assert received == {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "p1"}],
        "chosen": [{"role": "assistant", "content": "c1"}],
        "rejected": [{"role": "assistant", "content": "r1"}],
    }
    assert as_conversations(Dataset.from_list([received]))[0] == received


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("steer_adapter.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'steer-adapter\[train\]'"):
        load_pairs(write(tmp_path / "pairs.jsonl", ROWS))


def test_tokens_are_counted_and_none_is_an_error():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6], "other": "x"}]
    dataset = Dataset.from_list(rows)
    assert list(token_counts(dataset)) == [(2, 1, 3)]
    check_tokens(dataset, "pairs")
    dataset = Dataset.from_list([*rows, {**rows[0], "chosen_ids": []}]).select([1, 0])
    assert list(token_counts(dataset)) == [(2, 0, 3), (2, 1, 3)]
    with pytest.raises(DataError, match="pairs, row 1: the tokenizer makes no token of an answer"):
        check_tokens(dataset, "pairs")
    same = Dataset.from_list([{**rows[0], "rejected_ids": [3]}] * 2)
    with pytest.raises(DataError, match="pairs: the tokenizer makes the same tokens of chosen and rejected"):
        check_tokens(same, "pairs")
