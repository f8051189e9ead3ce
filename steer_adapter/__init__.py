"""Steering vectors for language models, as PEFT adapters. Importing this package registers the tuner with PEFT."""

from typing import TYPE_CHECKING, Any

from steer_adapter.extras import require
from steer_adapter.sharing.loading import load_library
from steer_adapter.tuner import SteerConfig, SteerLayer, SteerModel
from steer_adapter.tuner.combine import add_weighted_adapter
from steer_adapter.tuner.registration import register
from steer_adapter.tuner.strength import set_adapters, set_multiplier, steering
from steer_adapter.tuner.swap import swap_vector
from steer_adapter.verify import verify
from steer_adapter.version import __version__


if TYPE_CHECKING:
    from steer_adapter.learn.bipo import BiPOConfig, BiPOTrainer

__all__ = [
    "BiPOConfig",
    "BiPOTrainer",
    "SteerConfig",
    "SteerLayer",
    "SteerModel",
    "__version__",
    "add_weighted_adapter",
    "load_library",
    "set_adapters",
    "set_multiplier",
    "steering",
    "swap_vector",
    "verify",
]

register()


def __getattr__(name: str) -> Any:
    # TRL is an extra, and slow to import: it is loaded with the first trainer that is asked for.
    if name in ("BiPOConfig", "BiPOTrainer"):
        require("trl", "train", name)
        from steer_adapter.learn import bipo

        return getattr(bipo, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
