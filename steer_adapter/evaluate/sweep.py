"""How far a vector moves a model towards chosen answers, over a range of multipliers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from steer_adapter.errors import DataError
from steer_adapter.log_probs import completion_log_probs
from steer_adapter.tuner import SteerLayer
from steer_adapter.tuner.strength import set_multiplier


@dataclass(frozen=True)
class Sweep:
    """Propensity of each pair at each multiplier.

    Attributes:
        propensity: by multiplier, log p(chosen) − log p(rejected) of each pair in nats, `[N]` float32. Always holds 0.
    """

    propensity: dict[float, torch.Tensor]

    @property
    def multipliers(self) -> list[float]:
        return sorted(self.propensity)

    def change(self, multiplier: float) -> torch.Tensor:
        """The margin: the change of propensity against multiplier 0, in nats, `[N]`."""
        return self.propensity[multiplier] - self.propensity[0.0]

    def margin(self, multiplier: float) -> float:
        """Mean change of propensity, in nats."""
        return float(self.change(multiplier).mean())

    def right_way(self, multiplier: float) -> float:
        """Share of the pairs that move the way the multiplier's sign says."""
        return float((self.change(multiplier) * multiplier > 0).float().mean())


def sweep(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    multipliers: Iterable[float] = (-2.0, -1.0, 1.0, 2.0),
    adapter_name: str | None = None,
    progress: bool = True,
) -> Sweep:
    """Measure propensity at each multiplier, and at 0.

    Args:
        model: a model that carries a vector. Its multipliers are set back at the end.
        batches: as TRL's preference collator makes them.
        multipliers: strengths to try.
        adapter_name: whose; by default the active vectors.
        progress: show a bar.

    Raises:
        DataError: there are no pairs.
    """
    if not batches:
        raise DataError("sweep: received no preference pairs, expected at least one batch.")
    wanted = sorted({0.0, *map(float, multipliers)})
    layers = [module for module in model.modules() if isinstance(module, SteerLayer)]
    before = [{name: float(value) for name, value in layer.multipliers.items()} for layer in layers]
    training = model.training
    propensity = {}
    model.eval()
    try:
        with tqdm(total=len(wanted) * len(batches), desc="Measuring margins", disable=not progress) as bar:
            for multiplier in wanted:
                set_multiplier(model, multiplier, adapter_name)
                rows = []
                for batch in batches:
                    chosen, rejected = completion_log_probs(model, batch).chunk(2)
                    rows.append(chosen - rejected)
                    bar.update()
                propensity[multiplier] = torch.cat(rows)
    finally:
        model.train(training)
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                layer.set_multiplier(name, value)
    return Sweep(propensity)
