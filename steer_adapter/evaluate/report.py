"""A short report, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from .sweep import Sweep


def margins_table(sweeps: Mapping[str, Sweep]) -> str:
    """Mean margins in nats and the share of pairs that move the right way, a line for each multiplier and vector."""
    names = list(sweeps)
    header = "| multiplier | " + " | ".join(f"{name}: margin | right way" for name in names) + " |"
    lines = [header, "|---" * (1 + 2 * len(names)) + "|"]
    for multiplier in next(iter(sweeps.values())).multipliers:
        cells = [f"{sweeps[n].margin(multiplier):+.2f} | {_share(sweeps[n], multiplier)}" for n in names]
        lines.append(f"| {multiplier:+g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(result: Sweep, multiplier: float) -> str:
    return "" if multiplier == 0 else f"{result.right_way(multiplier):.0%}"


def answers_section(answers: Mapping[str, Mapping[float, str]]) -> str:
    """Answers by question and multiplier."""
    parts = []
    for question, by_multiplier in answers.items():
        parts.append(f"**{question}**\n")
        parts.extend(f"- `{multiplier:+g}` {' '.join(text.split())}" for multiplier, text in by_multiplier.items())
        parts.append("")
    return "\n".join(parts)
