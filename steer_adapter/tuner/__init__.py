"""The tuner: configuration, layer, model, and their registration with PEFT."""

from .config import SteerConfig
from .layer import SteerLayer
from .model import SteerModel


__all__ = ["SteerConfig", "SteerLayer", "SteerModel"]
