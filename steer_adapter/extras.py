"""Optional dependencies: a clear word instead of a bare ImportError."""

from __future__ import annotations

from importlib.util import find_spec

from steer_adapter.errors import MissingExtraError


def require(package: str, extra: str, feature: str) -> None:
    """Check that an optional package is installed.

    Raises:
        MissingExtraError: it is not; the message names the pip command.
    """
    if find_spec(package) is None:
        raise MissingExtraError(feature, package, extra)
