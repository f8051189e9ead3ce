"""Pictures of what a vector does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from steer_adapter.extras import require

from .sweep import Sweep


COLORS = ("#2a6f97", "#b08968", "#6a994e", "#9d4edd")


def plot_margins(sweeps: Mapping[str, Sweep], path: str | Path, title: str) -> None:
    """Draw the mean margin per multiplier, with its standard error, as a PNG.

    Args:
        sweeps: by name of the vector.
        path: the file, written whole or not at all.
        title: the line above the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "plot", "Plotting margins")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.axvline(0, color="0.7", linewidth=0.8)
    for (name, result), color in zip(sweeps.items(), COLORS, strict=False):
        changes = [result.change(multiplier) for multiplier in result.multipliers]
        errors = [float(c.std(correction=0)) / max(len(c), 1) ** 0.5 for c in changes]
        means = [float(c.mean()) for c in changes]
        axes.errorbar(result.multipliers, means, errors, marker="o", capsize=3, color=color, label=name)
    axes.set_xlabel("multiplier")
    axes.set_ylabel("change of log p(chosen) − log p(rejected)  [nats]")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    beside = f"{path}.incomplete"
    figure.savefig(beside, format="png")
    os.replace(beside, path)
