"""Names of models, as the Hub knows them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id


_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]+)/?$")


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


def revision_of(name: str | None) -> str | None:
    """The commit that a model was loaded from; `None` if that can't be told.

    A model does not remember it: it is read off the path, or off the cache if that holds a single snapshot.
    """
    match = _IN_CACHE.search((name or "").replace(os.path.sep, "/"))
    if match:
        return match[3]
    repo_id = hub_id(name)
    if repo_id is None:
        return None
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"), "snapshots")
    found = [path.parent.name for path in folder.glob("*/config.json")]
    return found[0] if len(found) == 1 else None


def same_model(first: str | None, second: str | None) -> bool:
    """Whether two names may mean one model: the same id or path, or a local copy that kept its name."""
    if not first or not second:
        return True
    ids = [hub_id(name) or name for name in (first, second)]
    ends = [name.replace(os.path.sep, "/").rstrip("/").rpartition("/")[2] for name in ids]
    return ends[0] == ends[1]
