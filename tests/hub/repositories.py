"""What a small Hub keeps: users, repositories, commits, large files."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import Any

LARGE = (".safetensors", ".bin", ".png")  # as .gitattributes of the Hub has them


@dataclass(frozen=True)
class File:
    """A file of a commit: its bytes, or where the large ones are."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        """As clients compare it."""
        return self.sha256 if self.large else self.blob


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    description: str
    files: dict[str, File]


@dataclass
class Repository:
    name: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    pulls: dict[int, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.branches:
            self.branches["main"] = []
            self.commit("main", "initial commit", "", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)

    def commit(self, branch: str, message: str, description: str, files: dict[str, File]) -> Commit:
        count = sum(map(len, self.branches.values()))
        sha = hashlib.sha1(f"{self.name} {branch} {count}".encode()).hexdigest()
        self.branches[branch].append(Commit(sha, message, description, files))
        return self.branches[branch][-1]

    def pull(self, title: str) -> int:
        number = len(self.pulls) + 1
        self.pulls[number] = {"title": title, "status": "draft"}
        self.branches[f"refs/pr/{number}"] = list(self.branches["main"])
        return number

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """What a test looks at."""
        return {name: file.content for name, file in self.branches[branch][-1].files.items()}


@dataclass
class User:
    """`role`: of the token; `organizations`: that it may write to."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.organizations)


@dataclass
class Hub:
    """`users` by token."""

    users: dict[str, User] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256

    def apply(self, repository: Repository, branch: str, lines: list[dict[str, Any]]) -> Commit:
        """One commit from the lines of a request. Raises KeyError for a large file that never arrived."""
        files = dict(repository.branches[branch][-1].files)
        header: dict[str, Any] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = File(self.large[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return repository.commit(branch, header["summary"], header.get("description", ""), files)
