"""`steer-adapter push`: an adapter to the Hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from steer_adapter.sharing.push import push_adapters


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="steer-adapter push",
        description="Upload a steering adapter, or a library with one in each subfolder, in one commit. Nothing but "
        "the adapters' own files is uploaded.",
    )
    result.add_argument("folder", metavar="DIR", help="folder of the adapter")
    result.add_argument("repo_id", metavar="REPO", help="repository on the Hub, e.g. user/vector; made if need be")
    result.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    result.add_argument("--revision", help="branch to push to, made if need be")
    result.add_argument("--token", help="token of the Hub; by default the stored one")
    result.add_argument("--message", default="Upload steering vectors", help="message of the commit")
    result.add_argument("--overwrite-card", action="store_true", help="replace a card that was edited on the Hub")
    return result


def run(argv: Sequence[str]) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    commit = push_adapters(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        token=arguments.token,
        revision=arguments.revision,
        overwrite_card=arguments.overwrite_card,
        commit_message=arguments.message,
    )
    print(f"The adapter is at {commit.repo_url}, commit {commit.oid}.")
