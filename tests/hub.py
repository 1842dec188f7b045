"""A Hub of our own on the loopback: what the real client asks the real one, with faults on demand.

Repositories, commits and tags live in memory. Files above `LARGE` bytes, and all safetensors, go through LFS as the
Hub's own rules would have it. Xet, the Hub's newer way of storage, is not spoken: clients set HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 100_000
READ, WRITE = "hf_" + "r" * 34, "hf_" + "w" * 34  # tokens


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Git's name of the content; of a large file, of the pointer that git keeps."""
        data = self.data
        if self.lfs:
            sha256 = hashlib.sha256(data).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
            data = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)  # of main, the last one is its head
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        wanted = self.commits[-1].oid if revision == "main" else self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == wanted), None)

    def add(self, title: str, files: dict[str, Blob]) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))
        return self.commits[-1]


@dataclass
class Fault:
    """What goes wrong the next `times` times that a request matches."""

    request: str  # a pattern of "METHOD /path"
    times: int = 1
    skip: int = 0  # after this many that went well
    status: int | None = None  # answer this instead; None: the connection is lost
    after: bool = False  # only once the request has been done: its answer gets lost

    def due(self, line: str) -> bool:
        if not self.times or not re.search(self.request, line):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}  # models/owner/name
        self.store: dict[str, bytes] = {}  # LFS
        self.faults: list[Fault] = []
        self.asked: list[str] = []  # "METHOD /path" of every request
        self.sent: list[str] = []  # files that were downloaded
        self.authorizations: set[str] = set()
        self.endpoint = ""

    def model(self, repo_id: str) -> Repo:
        return self.repos[f"models/{repo_id}"]

    def dataset(self, repo_id: str) -> Repo:
        return self.repos[f"datasets/{repo_id}"]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.asked)


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: Handler(hub, *arguments))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        self.status, self.code, self.answer = status, code, {"error": message or f"status {status}", **more}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        line = f"{self.command} {path}"
        self.hub.asked.append(line)
        fault = next((f for f in self.hub.faults if f.due(line)), None)
        if fault and not fault.after and fault.status is None:
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))  # in the middle of the upload
            return self.hang_up()
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length) if length else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        try:
            if fault and not fault.after:
                raise Refused(fault.status or 500)
            status, answer, headers = self.answer(path)
        except Refused as refused:
            status, answer = refused.status, refused.answer
            headers = {"X-Error-Code": refused.code} if refused.code else {}
        if fault and fault.after:
            return self.hang_up()
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        if not isinstance(answer, bytes):
            headers = {"Content-Type": "application/json", **headers}
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, path: str) -> tuple[int, Any, dict[str, str]]:
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", lambda: {"errors": [], "warnings": []}),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/refs", self.refs),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.info),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)", self.preupload),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)", self.commit),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/tag/([^/]+)", self.tag),
            ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/lfs/([0-9a-f]{64})", self.put),
        ]
        for method, pattern, action in routes:
            if self.command == method and (match := re.fullmatch(pattern, path)):
                return 200, action(*match.groups()), {}
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        raise Refused(404)

    def writer(self) -> None:
        """Only who writes needs the right token; a token that nobody knows is refused everywhere."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.authorizations.add(token)
        if token not in (READ, WRITE):
            raise Refused(401, message="Invalid username or password.")
        if token == READ:
            raise Refused(403, message="Forbidden: you need a token with write access")

    def repo(self, kind: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get(f"{kind}/{repo_id}")
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            raise Refused(401, "RepoNotFound")
        return repo

    def commit_at(self, kind: str, repo_id: str, revision: str | None) -> Commit:
        if commit := self.repo(kind, repo_id).at(revision or "main"):
            return commit
        raise Refused(404, "RevisionNotFound")

    def create(self) -> Any:
        self.writer()
        asked = json.loads(self.body)
        kind = "datasets" if asked.get("type") == "dataset" else "models"
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        if f"{kind}/{repo_id}" in self.hub.repos:
            raise Refused(409, message="You already created this repo", url=url)
        repo = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.add("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        self.hub.repos[f"{kind}/{repo_id}"] = repo
        return {"url": url}

    def refs(self, kind: str, repo_id: str) -> Any:
        repo = self.repo(kind, repo_id)
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": oid} for t, oid in repo.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1].oid}
        return {"branches": [main], "converts": [], "tags": tags}

    def info(self, kind: str, repo_id: str, revision: str | None) -> Any:
        commit = self.commit_at(kind, repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self.repo(kind, repo_id).private
        return {"id": repo_id, "sha": commit.oid, "private": private, "siblings": siblings, "tags": []}

    def tree(self, kind: str, repo_id: str, revision: str) -> Any:
        found = []
        for path, blob in sorted(self.commit_at(kind, repo_id, revision).files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
            found.append(entry)
        return found

    def preupload(self, kind: str, repo_id: str, revision: str) -> Any:
        self.writer()
        there = self.commit_at(kind, repo_id, revision).files
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > LARGE
            old = there.get(file["path"])
            oid = None if old is None else old.sha256 if old.lfs else old.oid
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, kind: str | None, repo_id: str) -> Any:
        self.writer()
        self.repo("datasets" if kind else "models", repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = dict(wanted)
            if wanted["oid"] not in self.hub.store:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="other content than announced")
        self.hub.store[oid] = self.body
        return {}

    def commit(self, kind: str, repo_id: str, revision: str) -> Any:
        self.writer()
        repo = self.repo(kind, repo_id)
        files, title = dict(repo.commits[-1].files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    if value["oid"] not in self.hub.store:
                        raise Refused(400, message=f"{value['path']} was not uploaded")
                    files[value["path"]] = Blob(self.hub.store[value["oid"]], True)
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise Refused(400, message=f"unknown operation {other}")
        commit = repo.add(title, files)
        return {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit.oid}", "commitOid": commit.oid}

    def tag(self, kind: str, repo_id: str, revision: str) -> Any:
        self.writer()
        repo, name = self.repo(kind, repo_id), json.loads(self.body)["tag"]
        if name in repo.tags:
            raise Refused(409, message="Tag already exists")
        repo.tags[name] = self.commit_at(kind, repo_id, revision).oid
        return {}

    def resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        commit = self.commit_at("datasets" if kind else "models", repo_id, revision)
        if path not in commit.files:
            raise Refused(404, "EntryNotFound")
        blob = commit.files[path]
        if self.command == "GET":
            self.hub.sent.append(path)
        etag = blob.sha256 if blob.lfs else blob.oid
        return 200, blob.data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid}

    def log_message(self, *arguments: object) -> None:
        pass
