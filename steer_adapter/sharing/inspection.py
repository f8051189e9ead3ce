"""What there is to know about adapters before any of them is put on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer_adapter.errors import SteerError
from steer_adapter.files.card import Facts, recommended_range
from steer_adapter.files.names import same_model
from steer_adapter.shapes import lengths, widths, with_parts
from steer_adapter.tuner.facts import facts_of

from .source import adapters, fetch, load_config


def inspect_adapters(
    name: str, names: list[str] | None = None, revision: str | None = None, token: str | bool | None = None
) -> list[dict[str, Any]]:
    """Look at the adapters of a folder or repository. No model is loaded, and nothing in them is run.

    Args:
        name: a folder or a Hub id.
        names: of the adapters, all by default.
        revision, token: for the Hub.

    Returns:
        for each adapter what `docs/format.md` says of it, in plain values; of one that is broken, `name` and `error`.
    """
    folder = fetch(name, revision, token)
    return [_inspected(adapter, path, name) for adapter, path in adapters(folder, name, names).items()]


def _inspected(adapter: str, path: Path, source: str) -> dict[str, Any]:
    try:
        load_config(path)
        return {"name": adapter, **described(facts_of(path, source, None if adapter == "default" else adapter))}
    except SteerError as error:
        return {"name": adapter, "error": str(error)}


def described(facts: Facts) -> dict[str, Any]:
    """Facts in plain values, with warnings about what a stranger would miss."""
    config, known = facts.config, facts.provenance
    multiplier = config.get("multiplier", 1.0)
    return {
        "base_model": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "model_type": config.get("model_type"),
        "hidden_size": config.get("hidden_size"),
        "num_hidden_layers": config.get("num_hidden_layers"),
        "format_version": config.get("format_version"),
        "operation": config.get("operation"),
        "stack": config.get("stack"),
        "target_modules": config.get("target_modules"),
        "token_scope": config.get("token_scope", "all"),
        "multiplier": multiplier,
        "layers": [
            {"layer": v.place, "norm": v.norm, "residual_norm": v.residual_norm, "dose": v.dose(multiplier)}
            for v in facts.vectors
        ],
        "recommended_multipliers": recommended_range(known.get("margins") or {}),
        **{key: known.get(key) for key in _SHOWN},
        "card_warnings": card_warnings(facts),
    }


_SHOWN = ("method", "behavior", "license", "data", "held_out", "margins", "side_effects", "seed", "versions")


def card_warnings(facts: Facts) -> list[str]:
    """What a stranger would miss."""
    known, multiplier = facts.provenance, facts.config.get("multiplier", 1.0)
    base = facts.config.get("base_model_name_or_path")
    found = {
        "there is no README.md": "README.md" not in facts.files,
        "no license was chosen": not known.get("license"),
        "the base model is not named": not base,
        f"the base model {base!r} is a local path, which nobody else has": bool(base) and not facts.base_model,
        "the revision of the base model is not recorded": not facts.config.get("revision"),
        "it does not say what the vector is for": not known.get("behavior"),
        "the data is not recorded": not (known.get("data") or {}).get("sha256"),
        "margins were not measured on held-out pairs": not known.get("margins"),
        "side effects were not measured": not known.get("side_effects"),
        **{
            f"mean |h| of layer {v.place}, {v.residual_norm:g}, gives no finite dose": v.dose(multiplier) is None
            for v in facts.vectors
            if v.residual_norm is not None
        },
    }
    return [warning for warning, holds in found.items() if holds]


def _parts(config: Any, inspected: dict[str, Any]) -> list[Any]:
    """The configs that may speak of the layers that an adapter steers."""
    if inspected["stack"] is None and inspected["target_modules"] is None:
        return [config if getattr(config, "is_encoder_decoder", False) else config.get_text_config()]
    return list(with_parts(config))


def fit(inspected: dict[str, Any], model_name: str) -> str:
    """Whether an adapter fits a model, by the two configs alone.

    For an adapter on a `stack` any part of the model's config may be the one that fits; of one on `target_modules`
    only the hidden size can be compared.

    Args:
        inspected: of `inspect_adapters`.
        model_name: folder or Hub id; only its config is read.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_name)
    made_for = f"{inspected['base_model']} ({inspected['model_type']})"
    parts = _parts(config, inspected)
    needed = {"hidden_size": widths, "num_hidden_layers": lengths}
    if inspected["target_modules"] is not None:
        del needed["num_hidden_layers"]
    for name, read in needed.items():
        parts, found = (
            [part for part in parts if inspected[name] in read(part)],
            sorted(set().union(*map(read, parts))),
        )
        if not parts:
            return f"does not fit: {made_for} has {name}={inspected[name]}, {model_name} {found or None}"
    if inspected["target_modules"] is not None:
        return f"fits by its hidden size; whether {model_name} has the blocks that it names is seen on loading"
    if same_model(inspected["base_model"], model_name):
        return "fits"
    return f"fits by its shape, but was made for {made_for}: whether it transfers has to be measured"
