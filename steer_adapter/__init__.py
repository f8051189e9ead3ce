"""Steering vectors for language models, as PEFT adapters. Importing this package registers the tuner with PEFT."""

from steer_adapter.tuner import SteerConfig, SteerLayer, SteerModel
from steer_adapter.tuner.registration import register
from steer_adapter.tuner.strength import set_multiplier


from steer_adapter.version import __version__
__all__ = ["SteerConfig", "SteerLayer", "SteerModel", "set_multiplier"]

register()
