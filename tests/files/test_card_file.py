from __future__ import annotations

import pytest
from huggingface_hub import ModelCard, ModelCardData

from steer_adapter.files.card_file import (
    adopt_metadata,
    is_edited,
    is_library_card,
    is_readable,
    kept_if_edited,
    write_card,
)


DATA = {"base_model": "org/model", "license": "unknown", "tags": ["steer-adapter"], "library_name": "peft"}
UNREADABLE = [
    b"---\n{[\n---\n# Mine",
    b"---\ntags: 3\n---\n# Mine",
    b"---\n- 1\n---\n# Mine",
    "# Café".encode("latin-1"),
]
VERSIONS = {"PEFT": "0.21.2"}


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "README.md"
    assert write_card(path, DATA, "# Title\n\nText.", VERSIONS)
    return path


def test_what_is_written(card):
    loaded = ModelCard.load(card)
    assert loaded.data.to_dict() == DATA
    assert "# Title" in loaded.text and "- PEFT 0.21.2" in loaded.text
    assert not is_edited(card.read_text()) and sorted(p.name for p in card.parent.iterdir()) == ["README.md"]


def test_an_unedited_card_is_renewed(card):
    assert write_card(card, dict(DATA, tags=["steer-adapter", "bipo"]), "# Other", VERSIONS)
    assert "# Other" in card.read_text() and "Title" not in card.read_text()
    assert ModelCard.load(card).data.tags == ["bipo", "steer-adapter"]


def test_the_stub_of_peft_is_replaced(tmp_path):
    stub = ModelCard.from_template(ModelCardData())
    stub.data["base_model"] = "/home/me/model"
    stub.data["tags"] = ["base_model:adapter:/home/me/model", "transformers"]
    stub.text += "\n### Framework versions\n\n- PEFT 0.21.2"
    stub.save(tmp_path / "README.md")
    assert is_library_card(tmp_path / "README.md"), "it may become one"
    without = {key: value for key, value in DATA.items() if key != "base_model"}
    assert write_card(tmp_path / "README.md", without, "# Title", VERSIONS)
    assert "/home/me" not in (tmp_path / "README.md").read_text()


def test_what_peft_does_to_a_card_is_no_edit(card):
    loaded = ModelCard.load(card)
    loaded.data["tags"] = ["transformers"]
    loaded.text += "\n### Framework versions\n\n- PEFT 0.99"
    loaded.save(card)
    assert not is_edited(card.read_text())


def test_an_edited_card_stays(card):
    card.write_text(card.read_text().replace("Text.", "My own text."))
    assert is_edited(card.read_text())
    assert not write_card(card, DATA, "# Other", VERSIONS)
    assert "My own text." in card.read_text() and "# Other" not in card.read_text()


def test_a_card_of_ones_own_stays(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    assert not write_card(tmp_path / "README.md", DATA, "# Other", VERSIONS)
    assert "# Mine" in (tmp_path / "README.md").read_text() and not is_library_card(tmp_path / "README.md")


def test_metadata_of_others_is_kept(card):
    loaded = ModelCard.load(card)
    loaded.data["license"], loaded.data["language"] = "mit", "de"
    loaded.save(card)
    write_card(card, DATA, "# Other", VERSIONS)
    assert ModelCard.load(card).data.to_dict() == {**DATA, "license": "mit", "language": "de"}


@pytest.mark.parametrize("text", [b"", b"# Mine   \r\n", *UNREADABLE])
def test_kept_byte_for_byte(card, text):
    edited = bool(text)
    if edited:
        card.write_bytes(text)
    before = card.read_bytes()
    with kept_if_edited(card.parent) as found:
        card.write_text("# Something else")
    assert found is edited and (card.read_bytes() == before) is edited


def test_adopted_metadata(card):
    other = "---\nlicense: mit\nlanguage: de\nlibrary_name: other\n---\n# Words"
    adopt_metadata(card, other)
    assert ModelCard.load(card).data.to_dict() == {**DATA, "license": "mit", "language": "de"}
    adopt_metadata(card.parent / "new.md", other)
    assert (card.parent / "new.md").read_text() == other


def test_a_symbolic_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "README.md").symlink_to(tmp_path / "precious")
    write_card(tmp_path / "README.md", DATA, "# Title", VERSIONS)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_card_that_can_not_be_read_stays(card, text, caplog):
    card.write_bytes(text)
    assert is_edited(text.decode("utf-8", errors="replace")) and not is_library_card(card) and not is_readable(card)
    assert not write_card(card, DATA, "# Other", VERSIONS)
    assert card.read_bytes() == text and f"{card} can't be read as a model card" in caplog.text


def test_nothing_is_adopted_from_a_card_that_can_not_be_read(card):
    before = card.read_bytes()
    for text in UNREADABLE[:3]:
        adopt_metadata(card, text.decode())
    assert card.read_bytes() == before


def test_an_edited_card_comes_back_after_an_error(card):
    card.write_text("# Mine")
    with pytest.raises(KeyError), kept_if_edited(card.parent):
        assert not card.exists()
        raise KeyError
    assert card.read_text() == "# Mine" and [path.name for path in card.parent.iterdir()] == ["README.md"]
