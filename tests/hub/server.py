"""A small Hub on loopback that speaks the protocol of huggingface_hub's client, and fails when it is told to."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub.repositories import LARGE, Commit, File, Hub, Repository, User

PART = 48 << 10  # bytes: larger files come in parts of that size
DATE = "2026-11-25T12:00:00.000Z"


@dataclass
class Fault:
    """The next `times` requests whose method and path match fail: with a status, or (status 0) by cutting the line
    after `after` bytes of the body. `skip`: as many go well before."""

    request: str
    status: int = 0
    times: int = 1
    after: int = 0
    skip: int = 0


@dataclass
class Recorded:
    """What arrived: "METHOD /path", and how many bytes of it."""

    request: str
    size: int = 0
    token: str | None = None


@dataclass
class Server:
    hub: Hub
    url: str
    storage: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[Recorded] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, recorded.request) is not None for recorded in self.requests)

    def received(self, pattern: str) -> int:
        """Bytes of the bodies of matching requests."""
        return sum(recorded.size for recorded in self.requests if re.match(pattern, recorded.request))

    def due(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.match(fault.request, request):
                if fault.skip:
                    fault.skip -= 1
                    return None
                fault.times -= 1
                return fault
        return None


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@contextmanager
def serving(hub: Hub) -> Iterator[Server]:
    """The server, until the block ends."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.daemon_threads = True
    # Storage has another name than the Hub, so that the client treats it as the stranger that it is.
    server = Server(hub, f"http://127.0.0.1:{http.server_port}", f"http://localhost:{http.server_port}")
    http.state = server  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check/write", "may_write"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions", "open_pull"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions/(?P<number>\d+)", "pull"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions/(?P<number>\d+)/status", "set_status"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)(?:/(?P<part>\d+))?", "store"),
        ("POST", r"/lfs/(?P<oid>\w+)/complete", "complete"),
        ("POST", r"/lfs/(?P<oid>\w+)/verify", "verify"),
        ("GET", r"/lfs/(?P<oid>\w+)", "large"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/xet-(?P<kind>read|write)-token/(?P<revision>[^/]+)", "xet"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        self.query, self.body = parse_qs(address.query), b""
        recorded = Recorded(f"{self.command} {address.path}", token=self.token)
        self.state.requests.append(recorded)
        fault = self.state.due(recorded.request)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.status == 0:
            recorded.size = len(self.rfile.read(min(fault.after, length)))
            return self.cut()
        self.body = self.rfile.read(length)
        recorded.size = len(self.body)
        try:
            if fault is not None:
                raise Refused(fault.status, "the server has too much to do")
            name, values = self.route(address.path)
            getattr(self, name)(**values)
        except Refused as no:
            self.answer(no.status, {"error": str(no)}, {"X-Error-Code": no.code, "X-Error-Message": str(no)})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self, path: str) -> tuple[str, dict[str, Any]]:
        method = "GET" if self.command == "HEAD" else self.command
        for expected, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == expected:
                return name, {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        raise Refused(404, f"no such address: {self.command} {path}")

    def cut(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.rfile.close()

    @property
    def state(self) -> Server:
        return self.server.state  # type: ignore[attr-defined,no-any-return]

    @property
    def hub(self) -> Hub:
        return self.state.hub

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def user(self) -> User:
        if self.token not in self.hub.users:
            raise Refused(401, "Invalid username or password.")
        return self.hub.users[self.token]

    def repository(self, name: str, write: bool = False) -> Repository:
        found, user = self.hub.repositories.get(name), self.hub.users.get(self.token or "")
        if found is None or (found.private and (user is None or not user.owns(name))):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and (not self.user().owns(name) or self.user().role == "read"):
            raise Refused(403, "You don't have the rights to write to this repository")
        return found

    def found(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return commit

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass

    # what the client asks

    def whoami(self) -> None:
        user = self.user()
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
        organizations = [{"type": "org", "name": name} for name in user.organizations]
        self.answer(200, {"type": "user", "name": user.name, "orgs": organizations, "auth": token})

    def validate(self) -> None:
        text = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
        relation = yaml.safe_load(front[1]).get("base_model_relation") if front else None
        if relation not in (None, "quantized", "finetune", "adapter", "merge"):
            return self.answer(400, {"errors": [{"message": "base_model_relation is not known"}], "warnings": []})
        self.answer(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        asked, user = json.loads(self.body), self.user()
        name = f"{asked.get('organization') or user.name}/{asked['name']}"
        if name in self.hub.repositories:
            url = f"{self.state.url}/{name}"
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        if not user.owns(name) or user.role == "read":
            raise Refused(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(name, private)
        self.answer(200, {"url": f"{self.state.url}/{name}", "name": name})

    def info(self, repo: str, revision: str = "main") -> None:
        repository = self.repository(repo)
        commit = self.found(repository, revision)
        siblings = [{"rfilename": name} for name in commit.files]
        about = {"id": repo, "modelId": repo, "private": repository.private, "sha": commit.sha, "siblings": siblings}
        self.answer(200, about)

    def may_write(self, repo: str) -> None:
        self.repository(repo, write=True)
        self.answer(200, {})

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        commit = self.found(self.repository(repo), revision)
        entries = []
        for name, file in commit.files.items():
            if path and not name.startswith(f"{path}/"):
                continue
            entry = {"type": "file", "path": name, "size": file.size, "oid": file.blob}
            if file.large:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            entries.append(entry)
        if path and not entries:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        self.answer(200, entries)

    def branch(self, repo: str, revision: str) -> None:
        repository = self.repository(repo, write=True)
        if revision in repository.branches:
            raise Refused(409, f"the branch {revision} exists")
        repository.branches[revision] = list(repository.branches["main"])
        self.answer(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        files = self.found(self.repository(repo), revision).files
        said = []
        for file in json.loads(self.body)["files"]:
            old = files.get(file["path"])
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            said.append(entry | {"oid": None if old is None else old.oid})
        self.answer(200, {"files": said, "commitOid": self.found(self.repository(repo), revision).sha})

    def batch(self, repo: str) -> None:
        self.user()
        self.repository(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                answer["actions"] = self._actions(asked["oid"], asked["size"])
            objects.append(answer)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def _actions(self, oid: str, size: int) -> dict[str, Any]:
        """Where to put a large file, with a signature as storage has it."""
        put = f"{self.state.storage}/lfs/{oid}"
        upload: dict[str, Any] = {"href": f"{put}?X-Signature=secret"}
        if size > PART:
            parts = range(1, -(-size // PART) + 1)
            upload = {"href": f"{self.state.url}/lfs/{oid}/complete", "header": {"chunk_size": str(PART)}}
            upload["header"] |= {f"{part:05}": f"{put}/{part}?X-Signature=secret" for part in parts}
        return {"upload": upload, "verify": {"href": f"{self.state.url}/lfs/{oid}/verify"}}

    def store(self, oid: str, part: str = "") -> None:
        if self.query.get("X-Signature") != ["secret"]:
            raise Refused(403, "SignatureDoesNotMatch")
        self.hub.large[f"{oid}/{part}" if part else oid] = self.body
        self.answer(200, b"", {"ETag": f'"{oid}{part}"'})

    def complete(self, oid: str) -> None:
        parts = sorted(json.loads(self.body)["parts"], key=lambda part: part["partNumber"])
        self.hub.large[oid] = b"".join(self.hub.large.pop(f"{oid}/{part['partNumber']}") for part in parts)
        self.answer(200, {"success": True})

    def verify(self, oid: str) -> None:
        asked, content = json.loads(self.body), self.hub.large.get(oid, b"")
        if asked["size"] != len(content) or File(content, True).sha256 != oid:
            self.hub.large.pop(oid, None)
            raise Refused(422, "the file is not what was announced")
        self.answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        proposal = revision.startswith("refs/pr/") or "create_pr" in self.query
        repository = self.repository(repo, write=not proposal)
        self.user()
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        answer: dict[str, Any] = {"success": True}
        if "create_pr" in self.query:
            number = repository.pull(lines[0]["value"]["summary"])
            repository.pulls[number]["status"] = "open"
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.state.url}/{repo}/discussions/{number}"
        self.found(repository, revision)
        commit = self.hub.apply(repository, revision, lines)
        self.answer(
            200, answer | {"commitOid": commit.sha, "commitUrl": f"{self.state.url}/{repo}/commit/{commit.sha}"}
        )

    def open_pull(self, repo: str) -> None:
        self.user()
        number = self.repository(repo).pull(json.loads(self.body)["title"])
        self.answer(200, {"num": number})

    def pull(self, repo: str, number: str) -> None:
        pull = self.repository(repo).pulls[int(number)]
        about = {"title": pull["title"], "num": int(number), "status": pull["status"], "createdAt": DATE}
        about |= {
            "author": {"name": "me"},
            "repo": {"name": repo, "type": "model"},
            "isPullRequest": True,
            "events": [],
        }
        self.answer(200, about | {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": []})

    def set_status(self, repo: str, number: str) -> None:
        pull = self.repository(repo).pulls[int(number)]
        pull["status"] = json.loads(self.body)["status"]
        event = {"id": "1", "type": "status-change", "createdAt": DATE, "data": {"status": pull["status"]}}
        self.answer(200, {"newStatus": event})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self.found(self.repository(repo), revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            return self.answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        file = commit.files[path]
        if file.large:
            linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
            if file.elsewhere is not None:
                refresh = f"{self.state.url}/api/models/{repo}/xet-read-token/{commit.sha}"
                linked |= {"X-Xet-Hash": file.elsewhere[2], "X-Xet-Refresh-Route": refresh}
            return self.answer(302, b"", headers | linked | {"Location": f"{self.state.storage}/lfs/{file.sha256}"})
        self._send(file, headers)

    def xet(self, repo: str, kind: str, revision: str) -> None:
        """Where Xet storage is: a folder, which hf_xet takes for a server when it is told so."""
        self.repository(repo, write=kind == "write" and not revision.startswith("refs/pr/"))
        if self.hub.xet is None:
            raise Refused(404, "this Hub has no Xet storage")
        storage, until = f"local://{self.hub.xet}", str(int(time.time()) + 3600)
        headers = {"X-Xet-Cas-Url": storage, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": until}
        self.answer(200, {"casUrl": storage, "accessToken": "xet", "exp": int(until)}, headers)

    def large(self, oid: str) -> None:
        self._send(File(self.hub.large[oid], True), {})

    def _send(self, file: File, headers: dict[str, str]) -> None:
        tag = {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return self.answer(200, file.content, headers | tag)
        start, end = int(part[1]), int(part[2] or len(file.content) - 1)
        ranged = {"Content-Range": f"bytes {start}-{end}/{len(file.content)}"}
        self.answer(206, file.content[start : end + 1], headers | tag | ranged)
