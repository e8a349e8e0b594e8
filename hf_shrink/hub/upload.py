"""A folder on its way to the Hub: the repository, the branch or pull request, the files, in one commit."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from hf_shrink.hub.destination import Destination
from hf_shrink.hub.failures import asking, persist

# Weights that must not stay beside new ones: loaders would find either.
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
TITLE = 200  # characters that the Hub takes as the title of a pull request


@dataclass(frozen=True)
class Pushed:
    """What came of a push.

    Attributes:
        repo_id: "owner/name".
        commit: of huggingface_hub.
        url: where to look at it: the pull request, else the branch.
    """

    repo_id: str
    commit: CommitInfo
    url: str


def upload(folder: Path, destination: Destination, message: str, description: str = "", *, again: str = "") -> Pushed:
    """Push all files of a folder in one commit (the Hub's client splits hundreds of files into several).

    The repository and the branch are made when they are not there. Weights of an earlier push that this one does not
    hold are removed with it. What had arrived of an upload that broke off is not sent again; failures that may pass
    are tried again.

    Args:
        folder: what to push.
        destination: as `check_destination` gave it.
        message, description: of the commit, and of the pull request.
        again: the command that goes on after a failure, without the repository; for the message.

    Raises:
        HubError: the Hub says no.
        PushInterrupted: it did not get through; says how to go on.
        KeyboardInterrupt: it was stopped; says how to go on.
    """
    api, where = destination.api(), destination
    with asking(destination.repo_id, lambda: _go_on(again, where)):
        where = _prepared(api, destination, message, description)
        commit = persist(lambda: _sent(api, folder, where, message, description))
        number = where.pull_request
        if number is not None:
            persist(lambda: _open(api, where.repo_id, number))
    page = f"{api.endpoint}/{where.repo_id}"
    if number is not None:
        return Pushed(where.repo_id, commit, f"{page}/discussions/{number}")
    return Pushed(where.repo_id, commit, page if where.revision is None else f"{page}/tree/{where.revision}")


def _prepared(api: HfApi, destination: Destination, message: str, description: str) -> Destination:
    """The destination with its repository and branch there, a pull request being a branch of its own."""
    repo_id, revision = destination.repo_id, destination.revision
    if destination.create_pr:  # once only: of a lost answer a second try would make a second one
        pull = api.create_pull_request(repo_id, message[:TITLE], description=description or None)
        return replace(destination, revision=f"refs/pr/{pull.num}")
    if destination.pull_request is not None:
        return destination
    repo_id = persist(lambda: api.create_repo(repo_id, private=destination.private, exist_ok=True)).repo_id
    if revision is not None:
        persist(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    return replace(destination, repo_id=repo_id)


def _open(api: HfApi, repo_id: str, number: int) -> None:
    """A pull request is a draft while it is not whole."""
    if api.get_discussion_details(repo_id, number).status == "draft":
        api.change_discussion_status(repo_id, number, "open")


def _sent(api: HfApi, folder: Path, where: Destination, message: str, description: str) -> CommitInfo:
    return api.upload_folder(
        repo_id=where.repo_id,
        folder_path=folder,
        commit_message=message,
        commit_description=description,
        revision=where.revision,
        delete_patterns=_stale(api, folder, where),
    )


def _stale(api: HfApi, folder: Path, where: Destination) -> list[str] | None:
    """Patterns of the weights beside the config that the branch holds and the folder does not."""
    new = set(os.listdir(folder))
    old = [name for name in api.list_repo_files(where.repo_id, revision=where.revision) if "/" not in name]
    found = [name for name in old if name not in new and any(fnmatch(name, pattern) for pattern in WEIGHTS)]
    return [glob.escape(name) for name in found] or None


def _go_on(again: str, where: Destination) -> str:
    if not again:
        return ""
    return f". Nothing is lost, and what has arrived is not sent again: go on with {again} {where.arguments}"
