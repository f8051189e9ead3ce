"""Adapters to the Hub: what belongs to them and nothing else, in one commit, with a card that names the repository."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import yaml_dump
from peft.utils import CONFIG_NAME

from steer_adapter.errors import OutputError, SteerError
from steer_adapter.files.card_file import NAME, UNREADABLE, adopt_metadata, is_edited, is_readable
from steer_adapter.files.json_file import read_json
from steer_adapter.files.names import hub_id
from steer_adapter.tuner.facts import renew_all_cards

from .source import FILES, adapters, load_config


logger = logging.getLogger(__name__)


def push_adapters(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    overwrite_card: bool = False,
    commit_message: str = "Upload steering vectors",
) -> CommitInfo:
    """Push an adapter, or a library of them, to a repository that is created if need be.

    Everything goes into one commit, so that nobody ever sees half an adapter; a push that was cut off is simply
    repeated. Cards that nobody edited are written anew with the repository's name in them.

    Args:
        folder: of the adapter, or with one in each subfolder.
        repo_id: e.g. `"user/vector"`.
        private: of a new repository.
        token: of the Hub; by default the stored one.
        revision: a branch, created if need be.
        overwrite_card: replace a card that was edited on the Hub. Otherwise it stays, and a warning says so.
        commit_message: of the commit.

    Raises:
        VectorError, ConfigError: an adapter is broken; nothing was pushed.
        OutputError: a file is a symbolic link, which may lead to what nobody meant to publish; a card can't be read;
            or the Hub refused or broke off.
    """
    folder = Path(folder).expanduser()
    parts = adapters(folder, str(folder))
    for path in parts.values():
        _check(path)
    for card in {path / NAME for path in (folder, *parts.values())}:
        if card.is_file() and not is_readable(card):
            raise OutputError(
                f"{card} {UNREADABLE}, so the Hub would refuse it. Mend or delete it; nothing was pushed."
            )
    try:
        return _push(folder, list(parts.values()), repo_id, private, token, revision, overwrite_card, commit_message)
    except SteerError:
        raise
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        raise OutputError(
            f"Pushing {folder} to {repo_id!r} failed ({type(error).__name__}: {error}). An adapter appears in the "
            f"repository whole or not at all. {_advice(error)}"
        ) from error


def _advice(error: Exception) -> str:
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return "Log in with `hf auth login`, or pass a token that may write there."
    return "Push again."


def _check(path: Path) -> None:
    load_config(path)
    for file in FILES:
        if (path / file).is_symlink() or path.is_symlink():
            raise OutputError(f"{path / file}: received a symbolic link, expected the files themselves.")


def _push(
    folder: Path, parts: list[Path], repo_id: str, private: Any, token: Any, revision: str | None,
    overwrite_card: bool, commit_message: str,
) -> CommitInfo:  # fmt: skip
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        try:
            api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=revision)
    with tempfile.TemporaryDirectory() as beside:
        staged = Path(beside)
        for part in {folder, *parts}:
            _stage(part, staged / part.relative_to(folder))
        theirs = {} if overwrite_card else _cards_there(staged, repo_id, revision, token)
        for path, text in theirs.items():
            adopt_metadata(path, text)
        renew_all_cards(staged, repo_id)
        for path, text in theirs.items():
            if is_edited(text) and text != path.read_text(encoding="utf-8"):
                name = path.relative_to(staged).as_posix()
                logger.warning("%s in %s was edited and stays; overwrite_card=True replaces it.", name, repo_id)
                path.unlink()
        return api.upload_folder(repo_id=repo_id, folder_path=staged, revision=revision, commit_message=commit_message)


def _stage(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
    if (target / CONFIG_NAME).is_file():
        _without_local_base(target / CONFIG_NAME)
    if (target / "run.yaml").is_file():
        _without_local_paths(target / "run.yaml")


def _without_local_base(path: Path) -> None:
    """A config whose base model is its Hub id, or of a local one only the folder's name, as `./name`."""
    config = read_json(path)
    base = config.get("base_model_name_or_path")
    public = hub_id(base) or f"./{str(base).replace(os.path.sep, '/').rstrip('/').rpartition('/')[2]}"
    if not base or public == base:
        return
    if public.startswith("./"):
        logger.warning("The base model is a local folder, which nobody else has; its name is pushed as %s.", public)
    config["base_model_name_or_path"] = public
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _without_local_paths(path: Path) -> None:
    """A run file whose files are named by their last part: where they were is nobody's business."""
    text = path.read_text(encoding="utf-8")
    comments = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    options = yaml.safe_load(text)
    options.pop("output", None)
    short = {k: Path(v).name if isinstance(v, str) and os.path.isabs(v) else v for k, v in options.items()}
    path.write_text(comments + yaml_dump(short, sort_keys=False), encoding="utf-8")


def _cards_there(staged: Path, repo_id: str, revision: str | None, token: Any) -> dict[Path, str]:
    """The cards that the repository has already, by where they are about to be replaced from."""
    found = {}
    for folder in [staged, *(path for path in staged.iterdir() if path.is_dir())]:
        name = (folder / NAME).relative_to(staged).as_posix()
        try:
            path = hf_hub_download(repo_id, name, revision=revision, token=token)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
        found[folder / NAME] = Path(path).read_text(encoding="utf-8", errors="replace")
    return found
