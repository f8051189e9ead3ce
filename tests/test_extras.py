from __future__ import annotations

import pytest

from steer_adapter.errors import MissingExtraError, SteerError
from steer_adapter.extras import require


def test_what_is_installed_passes():
    require("torch", "train", "Anything")


def test_what_is_missing_names_the_command():
    with pytest.raises(
        MissingExtraError, match=r"Flying needs the package 'no_such_wings'.*pip install 'steer-adapter\[fly\]'"
    ):
        require("no_such_wings", "fly", "Flying")
    assert issubclass(MissingExtraError, (SteerError, ImportError))
