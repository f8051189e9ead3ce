"""Optional dependencies: a clear word instead of a bare ImportError."""

from __future__ import annotations

from importlib.util import find_spec

from steer_adapter.errors import MissingExtraError


def require(package: str, extra: str, feature: str, command: str | None = None) -> None:
    """Check that an optional package is installed.

    Args:
        package: name of the module.
        extra: the extra of this package that brings it.
        feature: what needs it.
        command: the pip command, where it is not that of the extra.

    Raises:
        MissingExtraError: it is not; the message names the pip command.
    """
    if find_spec(package) is None:
        raise MissingExtraError(feature, package, command or f"pip install 'steer-adapter[{extra}]'")
