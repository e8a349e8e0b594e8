"""Where something is pushed to, and whether it may: asked before anything is computed or sent."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from hf_shrink.errors import HubError
from hf_shrink.hub.failures import asking

HARMLESS = (".gitattributes", ".gitignore", "readme.md", "license", "license.md", "license.txt")


@dataclass(frozen=True)
class Destination:
    """A repository of models on the Hub.

    Attributes:
        repo_id: "owner/name", or a name alone for the owner of the token.
        private: of a repository that is made by the push; None: as the owner's settings say. True for one that is
            public already is an error.
        revision: a branch, made when it is not there, or "refs/pr/N" to go on with a pull request; None: the main one.
        create_pr: open a pull request instead of changing the repository.
        overwrite: also into a repository that holds something that is not of hf_shrink.
        token: None or True: the one that `hf auth login` or HF_TOKEN gives. It is only ever handed to huggingface_hub.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    overwrite: bool = False
    token: str | bool | None = field(default=None, repr=False)

    @property
    def pull_request(self) -> int | None:
        """The number of the pull request that the revision is."""
        found = re.fullmatch(r"refs/pr/(\d+)", self.revision or "")
        return int(found[1]) if found else None

    @property
    def arguments(self) -> str:
        """What `hf-shrink push FOLDER` needs after the folder to push there; the token is no option."""
        words = [self.repo_id]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision is not None else []
        words += ["--pr"] if self.create_pr and self.revision is None else []  # else it is open already
        words += ["--overwrite"] if self.overwrite else []
        return shlex.join(words)

    def api(self) -> HfApi:
        """The client that acts for this destination's token."""
        return HfApi(token=self.token)


def check_destination(destination: Destination, ours: str) -> Destination:
    """The destination under its full name, when a push may go there.

    Args:
        destination: what is asked for.
        ours: the file by which a repository of hf_shrink is known.

    Raises:
        HubError: no token, or one that may not write; a name that is taken by something else; options that exclude one
            another.
        PushInterrupted: the Hub gives no answer.
    """
    if destination.create_pr and destination.revision is not None:
        raise HubError(
            "a pull request is made against the main branch: leave the revision out, or push to refs/pr/N to go on "
            "with one that is there"
        )
    api = destination.api()
    with asking(destination.repo_id):
        me = api.whoami()
        repo_id = destination.repo_id if "/" in destination.repo_id else f"{me['name']}/{destination.repo_id}"
        _check_role(me, repo_id)
        found = _repository(api, repo_id)
        if found is None:
            _check_new(me, replace(destination, repo_id=repo_id))
            return replace(destination, repo_id=repo_id)
        destination = replace(destination, repo_id=found.id)
        if not destination.create_pr and destination.pull_request is None:  # proposals need no such right
            api.auth_check(found.id, write=True)
        files = _files(api, destination)
    _check_privacy(destination, found)
    _check_content(destination, files, ours)
    return destination


def _repository(api: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


def _files(api: HfApi, destination: Destination) -> list[str]:
    """What the branch holds; nothing where it is still to be made."""
    try:
        return api.list_repo_files(destination.repo_id, revision=destination.revision)
    except RevisionNotFoundError:
        return []


def _check_role(me: Mapping[str, Any], repo_id: str) -> None:
    if _role(me) == "read":
        raise HubError(f"the token of {me['name']} may only read; give one that may write to {repo_id}")


def _role(me: Mapping[str, Any]) -> str | None:
    """What the token may do where the Hub says it in a word: read, write or fineGrained."""
    token = (me.get("auth") or {}).get("accessToken") or {}
    return token.get("role")


def _check_new(me: Mapping[str, Any], destination: Destination) -> None:
    owner = destination.repo_id.split("/")[0]
    if destination.create_pr or destination.pull_request is not None:
        raise HubError(f"there is no repository {destination.repo_id} to open a pull request for, or it is not visible")
    owners = [me["name"], *(organization["name"] for organization in me.get("orgs") or ())]
    # Of other tokens the Hub may not say all organizations; then it decides when the repository is made.
    if owner not in owners and _role(me) == "write":
        raise HubError(
            f"there is no repository {destination.repo_id}, and {me['name']} may make one only for {', '.join(owners)}"
        )


def _check_privacy(destination: Destination, found: ModelInfo) -> None:
    if destination.private and not found.private:
        raise HubError(f"{found.id} is there already and is public; make it private on the Hub, or push elsewhere")


def _check_content(destination: Destination, files: list[str], ours: str) -> None:
    others = [name for name in files if name.lower() not in HARMLESS]
    proposed = destination.create_pr or destination.pull_request is not None
    if not others or ours in files or proposed or destination.overwrite:
        return
    branch = f" (branch {destination.revision})" if destination.revision else ""
    raise HubError(
        f"{destination.repo_id}{branch} holds something that hf_shrink did not make ({others[0]}"
        f"{f' and {len(others) - 1} more' if len(others) > 1 else ''}); push to another name or to a new branch "
        "(--revision), propose it (--pr), or put it over what is there (--overwrite)"
    )
