"""The model card of an adapter: what it says, from what its files say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .names import hub_id


MISUSE = (
    "A steering vector can be turned round: whoever has one for more of a behavior has, with a negative multiplier, "
    "one for less of it. Vectors can weaken refusals, give a product's answers a hidden slant, or imitate a person. "
    "Tell the users of a steered model that it is steered."
)
LIBRARY_TITLE = "# A library of steering vectors"
UNMEASURED = "Not measured. Steering far from multiplier 0 costs fluency and changes answers to unrelated questions."
METHODS = {
    "bipo": "BiPO ([arXiv 2406.00045](https://arxiv.org/abs/2406.00045))",
    "mean-difference": "mean difference (CAA, [arXiv 2312.06681](https://arxiv.org/abs/2312.06681))",
}


@dataclass(frozen=True)
class Vector:
    """One vector of an adapter.

    Attributes:
        place: the decoder layer, or the path of the module.
        norm: |v|.
        residual_norm: mean |h| at that layer, as measured when the vector was made, or `None`.
    """

    place: str
    norm: float
    residual_norm: float | None

    def dose(self, multiplier: float) -> float | None:
        """The relative dose |m·v| / mean|h|; `None` if mean|h| is not recorded, or too small for a finite result."""
        dose = abs(multiplier) * self.norm / self.residual_norm if self.residual_norm else math.inf
        return dose if math.isfinite(dose) else None


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter.

    Attributes:
        config: the contents of its `adapter_config.json`, checked.
        vectors: by layer.
        name: folder or Hub id to load it from.
        subfolder: of that, or `None`.
        files: names of the other files beside it.
        others: names of the subfolders beside it that hold an adapter each.
    """

    config: Mapping[str, Any]
    vectors: tuple[Vector, ...]
    name: str
    subfolder: str | None = None
    files: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.config.get("provenance") or {}

    @property
    def base_model(self) -> str | None:
        """The base model's Hub id."""
        return hub_id(self.config.get("base_model_name_or_path"))

    @property
    def places(self) -> str:
        return ", ".join(vector.place for vector in self.vectors)


def metadata(facts: Facts) -> dict[str, Any]:
    """The card's YAML block, in the Hub's words."""
    data: dict[str, Any] = {"library_name": "peft", "license": facts.provenance.get("license") or "unknown"}
    tags = {"steer-adapter", "steering-vector", "transformers"}
    if method := facts.provenance.get("method"):
        tags.add(inline(method))
    if facts.base_model:
        data |= {"base_model": facts.base_model, "base_model_relation": "adapter"}
        tags.add(f"base_model:adapter:{facts.base_model}")
    source = (facts.provenance.get("data") or {}).get("source")
    if isinstance(source, str) and source.count("/") == 1 and hub_id(source):
        data["datasets"] = [source]
    if is_causal(facts.config):
        data["pipeline_tag"] = "text-generation"
    return {**data, "tags": sorted(tags)}


def body(facts: Facts) -> str:
    """The card's text, in Markdown."""
    path = facts.config.get("base_model_name_or_path") or ""
    base = facts.base_model or inline(path.replace("\\", "/").rstrip("/").rpartition("/")[2]) or "a local model"
    sections = [
        f"# A steering vector for {base}",
        _introduction(facts, base),
        "## Use",
        f"```python\n{snippet(facts)}```",
        "## Strength",
        _strength(facts),
        "## How it was made",
        _origin(facts),
        "## Measured on held-out pairs",
        _margins(facts),
        "## Side effects",
        _side_effects(facts),
        "## What it could be misused for",
        MISUSE,
    ]
    if facts.others:
        sections.insert(4, _library(facts.name, facts.others))
    return "\n\n".join(sections)


def library_body(name: str, others: Sequence[str]) -> str:
    """The text of a card for a folder that holds adapters in subfolders only."""
    return f"{LIBRARY_TITLE}\n\n{_library(name, others)}\n\n## Misuse\n\n{MISUSE}"


def _library(name: str, others: Sequence[str]) -> str:
    return "\n\n".join(
        [
            "Adapters in subfolders, each with a card of its own: "
            + ", ".join(f"`{inline(o)}`" for o in others)
            + ".",
            "`steer-adapter inspect` lists them. On a transformers model `base`:",
            "```text\nfrom steer_adapter.sharing.loading import load_adapters\n"
            f"model = load_adapters(base, {name!r}, names={list(others[:2])!r})\n```",
        ]
    )


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether the base model generates text."""
    return config.get("task_type") == "CAUSAL_LM" or _model_class(config).endswith("ForCausalLM")


def _model_class(config: Mapping[str, Any]) -> str:
    mapping = config.get("auto_mapping") or {}
    name = str(mapping.get("base_model_class") or "")
    return name if name.isidentifier() and str(mapping.get("parent_library", "")).startswith("transformers.") else ""


def snippet(facts: Facts) -> str:
    """Python that loads the adapter on its base model and lets it speak."""
    model_class = _model_class(facts.config) or "AutoModelForCausalLM"
    subfolder = f", subfolder={facts.subfolder!r}" if facts.subfolder else ""
    revision = ", revision=config.revision" if facts.config.get("revision") else ""
    question = '"How was your day?"'
    if facts.provenance.get("chat"):
        encode = (
            f'tokenizer.apply_chat_template(\n    [{{"role": "user", "content": {question}}}],\n'
            '    add_generation_prompt=True,\n    return_tensors="pt",\n    return_dict=True,\n)'
        )
    else:
        encode = f'tokenizer({question}, return_tensors="pt")'
    classes = ", ".join(sorted(["AutoTokenizer", model_class]))
    return (
        "from peft import PeftConfig, PeftModel\n"
        f"from transformers import {classes}\n"
        "\n"
        "import steer_adapter  # pip install steer-adapter; importing it makes steering vectors known to PEFT\n"
        "\n"
        f"adapter = {facts.name!r}\n"
        f"config = PeftConfig.from_pretrained(adapter{subfolder})\n"
        f"base = {model_class}.from_pretrained(config.base_model_name_or_path{revision})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path{revision})\n"
        f"model = PeftModel.from_pretrained(base, adapter{subfolder})\n"
        f"model.set_multiplier({facts.config.get('multiplier', 1.0)!r})  # 0 is off, a negative one is reversed\n"
        "\n"
        f"inputs = {encode}\n"
        "output = model.generate(**inputs, max_new_tokens=40)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))\n"
    )


def recommended_range(margins: Mapping[str, Mapping[str, float]]) -> tuple[float, float] | None:
    """The multipliers around 0 over which the held-out margin keeps growing, within [−2, 2]; `None` if none does."""
    measured = sorted((float(m), values["margin"]) for m, values in margins.items() if "margin" in values)
    measured = [(m, margin) for m, margin in measured if abs(m) <= 2]
    up = _growing([(m, margin) for m, margin in measured if m > 0])
    down = _growing([(-m, -margin) for m, margin in reversed(measured) if m < 0])
    return (0.0 - down, up) if up or down else None


def _growing(points: Sequence[tuple[float, float]]) -> float:
    reached, best = 0.0, 0.0
    for multiplier, margin in points:
        if margin <= best:
            break
        reached, best = multiplier, margin
    return reached


def _introduction(facts: Facts, base: str) -> str:
    config, behavior = facts.config, facts.provenance.get("behavior")
    what = f" It is for: {inline(behavior)}." if behavior else ""
    several = len(facts.vectors) > 1
    return (
        f"A steering vector is added to the output of a decoder layer while the model runs; no weight changes.{what} "
        f"This one steers {'layers' if several else 'layer'} {facts.places} (counted from 0) of {base}"
        f" ({inline(config.get('model_type'))}, hidden size {config.get('hidden_size')}, "
        f"{config.get('num_hidden_layers')} layers). It loads with [PEFT](https://github.com/huggingface/peft) and "
        "the package `steer-adapter`."
    )


def _strength(facts: Facts) -> str:
    config = facts.config
    multiplier = config.get("multiplier", 1.0)
    rows = [[v.place, f"{v.norm:.4g}", _number(v.residual_norm), _number(v.dose(multiplier))] for v in facts.vectors]
    found = recommended_range(facts.provenance.get("margins") or {})
    if found:
        advice = (
            f"Recommended multipliers: {found[0]:+g} to {found[1]:+g}, where the held-out margin keeps growing with "
            "the multiplier."
        )
    else:
        advice = "Recommended multipliers: none was measured; start between -1 and +1."
    return "\n\n".join(
        [
            f"Operation: `{inline(config.get('operation'))}`, tokens: {inline(config.get('token_scope') or 'all')}, "
            f"initial multiplier: {multiplier:g}. {advice}",
            table(["layer", "norm of v", "mean norm of h", f"relative dose at {multiplier:g}"], rows),
            "The relative dose |m·v| / mean |h| is the strength that compares between models.",
        ]
    )


def _origin(facts: Facts) -> str:
    known = facts.provenance
    data = known.get("data") or {}
    rows = [
        ["method", METHODS.get(known.get("method", ""), inline(known.get("method") or "not recorded"))],
        ["base model revision", inline(facts.config.get("revision") or "not recorded")],
        ["trained on", inline(known.get("trained_on"))],
        ["data", inline(data.get("source") or "not recorded")],
        ["pairs", inline(data.get("pairs"))],
        ["SHA-256 of the pairs", inline(data.get("sha256") or "not recorded")],
        ["seed", inline(known.get("seed"))],
        *([inline(name), inline(value)] for name, value in (known.get("hyperparameters") or {}).items()),
        *([f"version of {inline(name)}", inline(value)] for name, value in (known.get("versions") or {}).items()),
    ]
    lines = [table(["", ""], [row for row in rows if row[1] not in ("", "None")])]
    if "run.yaml" in facts.files:
        lines.append(
            "`steer-adapter train --config run.yaml --output again` makes the same vector from the same data."
        )
    return "\n\n".join(lines)


def _margins(facts: Facts) -> str:
    margins = facts.provenance.get("margins") or {}
    if not margins:
        return "Not measured."
    held_out = facts.provenance.get("held_out") or {}
    rows = [
        [f"{float(m):+g}", _number(v.get("margin"), "+.3g"), _number(v.get("right_way"), ".0%")]
        for m, v in sorted(margins.items(), key=lambda item: float(item[0]))
    ]
    parts = [
        "Mean change of log p(chosen) − log p(rejected) against multiplier 0, in nats, and the share of pairs that "
        f"move the way the sign of the multiplier says. Pairs: {inline(held_out.get('pairs') or 'not recorded')}, "
        f"from {inline(held_out.get('source') or 'not recorded')}, "
        f"SHA-256 {inline(held_out.get('sha256') or 'not recorded')}.",
        table(["multiplier", "margin", "right way"], rows),
    ]
    if "margins.png" in facts.files:
        parts.append("![margins by multiplier](margins.png)")
    return "\n\n".join(parts)


def _side_effects(facts: Facts) -> str:
    measured = facts.provenance.get("side_effects")
    if not measured:
        return UNMEASURED
    return table(["what", "measured"], [[inline(name), inline(value)] for name, value in measured.items()])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _number(value: float | None, form: str = ".3g") -> str:
    return "not recorded" if value is None else f"{value:{form}}"


def inline(value: object) -> str:
    """A value as one line of Markdown, with nothing in it that Markdown or HTML acts on."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())[:500]
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|`\[\]!*])", r"\\\1", text)
