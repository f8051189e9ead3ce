"""The errors of this package. Each message says what was received, what was expected, and what to do."""

from __future__ import annotations


class SteerError(ValueError):
    """Base of every error that this package raises on purpose."""


class ConfigError(SteerError):
    """A [`SteerConfig`] (or a saved one) holds a value that can't be used."""


class UnknownMethodError(ConfigError, KeyError):
    """A saved config names no method that PEFT knows; a `KeyError`, as it is in PEFT."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would quote it


class ModelError(SteerError):
    """A model can't be steered as asked: no decoder layers, another shape, a layer out of range."""


class VectorError(SteerError):
    """A steering vector, or a file that should hold one, is missing, damaged or not finite."""


class AdapterNameError(SteerError):
    """An adapter was named that the model does not have."""


class DataError(SteerError):
    """Preference pairs that can't be trained on."""


class DivergenceError(SteerError):
    """Training went astray: a loss or a gradient that is not finite, or a loss that exploded."""


class OutputError(SteerError):
    """A result can't be written where it was asked for."""


class MissingExtraError(SteerError, ImportError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, package: str, command: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed. Install it with: {command}"
        )
