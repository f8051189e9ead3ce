"""Names of models, as the Hub knows them."""

from __future__ import annotations

import os
import re

from huggingface_hub.utils import HFValidationError, validate_repo_id


_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?$")


def hub_id(name: str | None) -> str | None:
    """The Hub id that a name or path stands for; `None` for a local folder that is no snapshot of one."""
    if not name:
        return None
    match = _IN_CACHE.search(name.replace(os.path.sep, "/"))
    if match:
        return f"{match[1]}/{match[2]}"
    if os.path.isdir(os.path.expanduser(name)):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def same_model(first: str | None, second: str | None) -> bool:
    """Whether two names may mean one model: the same id or path, or a local copy that kept its name."""
    if not first or not second:
        return True
    ids = [hub_id(name) or name for name in (first, second)]
    ends = [name.replace(os.path.sep, "/").rstrip("/").rpartition("/")[2] for name in ids]
    return ends[0] == ends[1]
