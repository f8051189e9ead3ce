from __future__ import annotations

import pytest
import yaml

from steer_adapter.files.card import (
    Facts,
    Vector,
    body,
    inline,
    library_body,
    metadata,
    recommended_range,
    snippet,
    table,
)


MARGINS = {"-2": -1.0, "-1": -1.5, "1": 2.0, "2": 3.0, "4": 5.0}
CONFIG = {
    "base_model_name_or_path": "org/model",
    "task_type": "CAUSAL_LM",
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "operation": "add",
    "multiplier": 0.5,
    "revision": "abc123",
    "provenance": {
        "method": "bipo",
        "behavior": "a cheerful tone",
        "license": "mit",
        "seed": 7,
        "data": {"source": "pairs.jsonl", "pairs": 100, "sha256": "f" * 64},
        "hyperparameters": {"beta": 0.1},
        "margins": {m: {"margin": value, "right_way": 0.9} for m, value in MARGINS.items()},
        "held_out": {"source": "test.jsonl", "pairs": 10, "sha256": "e" * 64},
        "side_effects": {"perplexity at +1": "+3 %"},
    },
}
FACTS = Facts(CONFIG, (Vector("1", 2.0, 8.0), Vector("3", 3.0, None)), "user/vector")


def test_metadata():
    assert metadata(FACTS) == {
        "base_model": "org/model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/model", "bipo", "steer-adapter", "steering-vector", "transformers"],
    }


def test_data_from_the_hub():
    known = {"data": {"source": "org/pairs"}}
    assert metadata(Facts({"provenance": known}, (), "x"))["datasets"] == ["org/pairs"]


def test_a_local_base_model_is_not_named(tmp_path):
    data = metadata(Facts({"base_model_name_or_path": str(tmp_path)}, (), "x"))
    assert "base_model" not in data and str(tmp_path) not in str(data) and data["license"] == "unknown"
    text = body(Facts({"base_model_name_or_path": f"{tmp_path}/my-model/"}, (Vector("1", 2.0, None),), "x"))
    assert "# A steering vector for my-model\n" in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    "words",
    [
        "a cheerful tone", "layers 1, 3", "org/model", "llama", "hidden size 32", "`add`", "-1 to +2", "abc123",
        "| 1 | 2 | 8 | 0.125 |", "| 3 | 3 | not recorded | not recorded |", "arXiv 2406.00045", "| seed | 7 |",
        "| beta | 0.1 |", "f" * 64, "e" * 64, "| +1 | +2 | 90% |", "perplexity at +1", "turned round",
    ],
)  # fmt: skip
def test_what_a_stranger_reads(words):
    assert words in body(FACTS)


def test_what_is_beside_is_mentioned():
    assert "run.yaml" not in body(FACTS) and "margins.png" not in body(FACTS)
    text = body(Facts(CONFIG, FACTS.vectors, "x", files=frozenset({"run.yaml", "margins.png"}), others=("calm",)))
    assert "--config run.yaml" in text and "![margins by multiplier](margins.png)" in text and "`calm`" in text


def test_what_is_not_known_is_said():
    text = body(Facts({"operation": "add", "multiplier": 1.0}, (Vector("1", 2.0, None),), "x"))
    assert "Not measured" in text and "none was measured" in text and "not recorded" in text


def test_the_snippet_follows_the_config():
    assert "adapter = 'user/vector'" in snippet(FACTS) and "revision=config.revision" in snippet(FACTS)
    mapping = {"base_model_class": "GPT2LMHeadModel", "parent_library": "transformers.models.gpt2.modeling_gpt2"}
    other = snippet(Facts({"auto_mapping": mapping, "provenance": {"chat": True}}, (), "a", "sub"))
    assert "GPT2LMHeadModel.from_pretrained" in other and "apply_chat_template" in other and "subfolder='sub'" in other
    evil = dict(mapping, base_model_class="x; import os")
    assert "import os" not in snippet(Facts({"auto_mapping": evil}, (), "a"))
    for facts in (FACTS, Facts(CONFIG, (), "a'b\n")):
        compile(snippet(facts), "snippet", "exec")


@pytest.mark.parametrize(
    ("margins", "wanted"),
    [
        (MARGINS, (-1.0, 2.0)),  # below -1 the margin shrinks, and 4 is beyond what is recommended
        ({}, None),
        ({"1": -1.0, "-1": 1.0}, None),
        ({"1": 1.0, "2": 0.5}, (0.0, 1.0)),
    ],
)
def test_recommended_range(margins, wanted):
    assert recommended_range({m: {"margin": value} for m, value in margins.items()}) == wanted


def test_text_of_strangers_stays_text():
    assert inline("a | b\n<script>`x` [c](d)") == "a \\| b &lt;script>\\`x\\` \\[c\\](d)"
    assert table(["a"], [["b"]]) == "| a |\n|---|\n| b |"
    evil = dict(CONFIG, provenance={"license": "mit\ntags: [x]", "behavior": "x\n# Heading"})
    assert "\n# Heading" not in body(Facts(evil, (), "x"))
    assert yaml.safe_load(yaml.safe_dump(metadata(Facts(evil, (), "x"))))["license"] == "mit\ntags: [x]"


def test_a_library():
    text = library_body("user/library", ["calm", "blunt"])
    assert "`calm`, `blunt`" in text and "load_adapters(base, 'user/library'" in text
