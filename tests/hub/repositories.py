"""What a small Hub keeps: users, repositories, commits, large files."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".bin", ".png")  # as .gitattributes of the Hub has them


@dataclass(frozen=True)
class File:
    """A file of a commit. Of one in Xet storage only this is known: SHA-256, size, and Xet's own hash."""

    content: bytes
    large: bool
    elsewhere: tuple[str, int, str] | None = None

    @property
    def sha256(self) -> str:
        return self.elsewhere[0] if self.elsewhere else hashlib.sha256(self.content).hexdigest()

    @property
    def size(self) -> int:
        return self.elsewhere[1] if self.elsewhere else len(self.content)

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
    """`users` by token. `xet`: a folder for hf_xet's local storage; None where large files come by LFS."""

    users: dict[str, User] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    xet: Path | None = None

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
                files[value["path"]] = self.stored(value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return repository.commit(branch, header["summary"], header.get("description", ""), files)

    def stored(self, sha256: str, size: int) -> File:
        """A large file that has arrived. Raises KeyError where it has not."""
        if self.xet is None:
            return File(self.large[sha256], True)
        return File(b"", True, (sha256, size, xet_hash(self.xet, sha256)))


def xet_hash(storage: Path, sha256: str) -> str:
    """Xet's name for a file, from the shards that describe what its local storage holds. Raises KeyError.

    A shard has for each file a header of 48 bytes (hash, flags, count), entries of 48 bytes, as many to verify them,
    and the SHA-256. Hashes are four words with the last byte first.
    """
    for shard in sorted(storage.rglob("shards/*.mdb")):
        content = shard.read_bytes()
        place = content.find(_swapped(bytes.fromhex(sha256)))
        for count in range(1, place // 96 + 1) if place >= 0 else ():
            start = place - 96 * count - 48
            if start >= 0 and int.from_bytes(content[start + 36 : start + 40], "little") == count:
                return _swapped(content[start : start + 32]).hex()
    raise KeyError(sha256)


def _swapped(digest: bytes) -> bytes:
    return b"".join(digest[start : start + 8][::-1] for start in range(0, 32, 8))
