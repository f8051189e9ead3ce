from __future__ import annotations

import pytest
import torch
from conftest import HIDDEN, make_model, random_vectors, set_vectors
from huggingface_hub import ModelCard
from peft import get_peft_model

from steer_adapter import SteerConfig
from steer_adapter.tuner.facts import facts_of, renew_all_cards, renew_cards, subfolders


def save(folder, *names, layers=(1, 3), **config):
    names = names or ("default",)
    model = None
    for name in names:
        own = SteerConfig(layers_to_transform=list(layers), task_type="CAUSAL_LM", **config)
        model = get_peft_model(make_model(), own, adapter_name=name) if model is None else model
        if name not in model.peft_config:
            model.add_adapter(name, own)
        set_vectors(model, random_vectors(list(layers)), name)
    model.save_pretrained(folder)
    return model


def test_facts(tmp_path):
    save(tmp_path, multiplier=0.5, provenance={"residual_norms": {"1": 4.0}})
    facts = facts_of(tmp_path, "user/vector")
    wanted = random_vectors([1, 3])
    assert [vector.place for vector in facts.vectors] == ["1", "3"]
    assert [vector.norm for vector in facts.vectors] == pytest.approx([float(wanted[i].norm()) for i in (1, 3)])
    assert facts.vectors[0].dose(0.5) == pytest.approx(0.5 * float(wanted[1].norm()) / 4)
    assert facts.vectors[1].dose(0.5) is None and facts.name == "user/vector"


def test_layers_come_in_order(tmp_path):
    model = get_peft_model(
        make_model(), SteerConfig(target_modules=["layers.2", "layers.0", "lm_head"], hidden_size=HIDDEN)
    )
    model.save_pretrained(tmp_path)
    assert [vector.place for vector in facts_of(tmp_path, "x").vectors] == ["0", "2", "lm_head"]


def test_the_card_comes_with_the_adapter(tmp_path):
    save(tmp_path / "a")
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert f"adapter = {str(tmp_path / 'a')!r}" in card.text


def test_an_edited_card_survives_saving(tmp_path):
    model = save(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("# A steering vector", "# My steering vector"))
    model.save_pretrained(tmp_path)
    assert "# My steering vector" in readme.read_text()
    before = readme.read_bytes()
    model.save_pretrained(tmp_path)
    assert readme.read_bytes() == before
    readme.unlink()
    model.save_pretrained(tmp_path)
    assert "# A steering vector" in readme.read_text()


def test_the_cards_of_a_library(tmp_path):
    for _ in range(2):  # the second time finds the cards of the first
        save(tmp_path, "calm", "blunt")
        assert subfolders(tmp_path) == ["blunt", "calm"]
        assert "`blunt`, `calm`" in (tmp_path / "README.md").read_text()
        text = (tmp_path / "calm" / "README.md").read_text()
        assert f"adapter = {str(tmp_path)!r}" in text and "subfolder='calm'" in text


def test_one_at_the_top_and_one_below(tmp_path):
    save(tmp_path, "default", "calm")
    text = (tmp_path / "README.md").read_text()
    assert "# A steering vector" in text and "`calm`" in text and "subfolder=" not in text.partition("## Strength")[0]
    assert "subfolder='calm'" in (tmp_path / "calm" / "README.md").read_text()


@pytest.mark.parametrize("name", ["checkpoint-10", ".incomplete-x"])
def test_checkpoints_are_no_library(tmp_path, name):
    save(tmp_path)
    save(tmp_path / name)
    assert subfolders(tmp_path) == []
    assert "subfolder=" not in (tmp_path / name / "README.md").read_text()
    renew_cards(tmp_path)
    assert name not in (tmp_path / "README.md").read_text().replace(str(tmp_path), "")


def test_all_cards_with_another_name(tmp_path):
    save(tmp_path, "calm", "blunt")
    renew_all_cards(tmp_path, "user/library")
    for path in (tmp_path, tmp_path / "calm", tmp_path / "blunt"):
        text = (path / "README.md").read_text()
        assert "user/library" in text and str(tmp_path) not in text


def test_the_snippet_runs_as_pasted(base_dir, load, tmp_path, capsys):
    model = get_peft_model(load(), SteerConfig(layers_to_transform=1, task_type="CAUSAL_LM"))
    for chat in (False, True):
        model.peft_config["default"].provenance = {"chat": chat}
        model.save_pretrained(tmp_path)
        code = (tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        names: dict = {}
        exec(compile(code, "card", "exec"), names)
        assert capsys.readouterr().out.strip()
        assert torch.isfinite(names["output"].float()).all() and ("apply_chat_template" in code) is chat
