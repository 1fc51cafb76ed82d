"""A hub of our own on this machine, for the tests: as much of the protocol as fetching a model takes."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


def commit(text: str) -> str:
    """The hash that stands for this commit."""
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Hub:
    """Repositories by id, and what goes wrong with them."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by id
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # by id and revision
    gated: set[str] = field(default_factory=set)
    lies: dict[str, bytes] = field(default_factory=dict)  # by file: what is sent for it
    cut: set[str] = field(default_factory=set)  # files of which only half is sent
    lost: set[str] = field(default_factory=set)  # files that are listed, and not there
    status: int = 200  # of every answer, if another
    asked: list[str] = field(default_factory=list)  # methods and paths, in order
    url: str = ""

    def add(self, id: str, directory: Path, revision: str = "main") -> str:
        """Puts a model directory on the hub; returns its commit."""
        files = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
        self.files[id] = files
        made = commit(repr(sorted(files.items())))
        self.commits.setdefault(id, {}).update({revision: made, made: made})
        return made

    @property
    def fetched(self) -> list[str]:
        """The names of the files that were sent, in order."""
        return [line.split("/")[-1] for line in self.asked if line.startswith("GET") and "/resolve/" in line]


class Answer(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.status != 200:
            return self.send(self.hub.status, b"")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            id, revision = "/".join(parts[2:4]), "/".join(parts[5:]) or "main"
        else:
            id, revision = "/".join(parts[:2]), parts[3]
        if id not in self.hub.files:
            return self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in self.hub.commits[id]:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        sha = self.hub.commits[id][revision]
        if parts[0] == "api":
            return self.send(200, json.dumps(self.described(id, sha)).encode(), {"Content-Type": "application/json"})
        if id in self.hub.gated:
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        self.send_file(id, sha, "/".join(parts[4:]))

    def described(self, id: str, sha: str) -> dict[str, object]:
        siblings = []
        for name, content in self.hub.files[id].items():
            described: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": commit(name)}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                described["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(described)
        return {"id": id, "sha": sha, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0}

    def send_file(self, id: str, sha: str, name: str) -> None:
        if name not in self.hub.files[id] or name in self.hub.lost:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = self.hub.lies.get(name, self.hub.files[id][name])
        digest = hashlib.sha256(self.hub.files[id][name]).hexdigest()
        self.send(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": sha}, half=name in self.hub.cut)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, half: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if half:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection = self.close_connection or half


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """The hub, listening; without its lock, so that it can be broken meanwhile."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Answer,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
