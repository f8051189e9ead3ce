"""Measurements written into the config of an adapter, from where its card and `steer-adapter inspect` take them."""

from __future__ import annotations

from steer_adapter.tuner import SteerConfig

from .sweep import Sweep


def record_sweep(config: SteerConfig, result: Sweep) -> None:
    """Put the margins of a sweep into the provenance of an adapter, to be saved with it.

    Args:
        config: of the adapter, as in `model.peft_config[name]`.
        result: on held-out pairs.
    """
    margins = {
        f"{multiplier:g}": {"margin": result.margin(multiplier), "right_way": result.right_way(multiplier)}
        for multiplier in result.multipliers
        if multiplier != 0
    }
    config.provenance = {**(config.provenance or {}), "margins": margins}
