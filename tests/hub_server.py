"""A small hub on localhost: repositories in memory, in the layout of the real one's addresses."""

from __future__ import annotations

import hashlib
import json
import re
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

__all__ = ["COMMIT", "Hub", "serve"]

COMMIT = "a" * 40
# Larger files are in LFS, with a SHA-256.
_LARGE = 1000


@dataclass
class Hub:
    """What is on the hub, how it is to misbehave, and what it was asked.

    ``fail`` answers all addresses that hold a text by a status and headers, ``drop`` cuts the next
    so many downloads after so many bytes, ``silent`` lets it wait for so many seconds, ``corrupt``
    sends other bytes than the checksums say, ``uploads`` has what was committed.
    """

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    fail: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    drop: list[int] = field(default_factory=list)
    silent: float = 0.0
    corrupt: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def ranges(self) -> list[str | None]:
        """Ranges of the downloads."""
        return [
            wanted for verb, path, wanted in self.requests if verb == "GET" and "/resolve/" in path
        ]


def _described(path: str, content: bytes) -> dict[str, object]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if len(content) > _LARGE:
        sha = hashlib.sha256(content).hexdigest()
        entry |= {"oid": "0" * 40, "lfs": {"oid": sha, "size": len(content), "pointerSize": 130}}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _asked(self) -> str | None:
        """Note the request; ``None`` if it was refused."""
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range")))
        time.sleep(hub.silent)
        for text, (status, headers) in hub.fail.items():
            if text in path:
                self._answer(status, b"{}", headers)
                return None
        return path

    def do_POST(self) -> None:
        """Make a repository, say how files are to come, take them."""
        length = int(self.headers.get("Content-Length") or 0)
        lines = [json.loads(line) for line in self.rfile.read(length).splitlines()]
        if (path := self._asked()) is None:
            return None
        hub = self.hub
        repo = "/".join(path.split("/")[3:5])
        told: dict[str, object] = {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            repo = f"{lines[0].get('organization') or 'me'}/{lines[0]['name']}"
            hub.repos.setdefault(repo, {})
            told = {"url": f"{hub.address}/{repo}"}
        elif "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in lines[0]["files"]]
            told = {"files": [{**file, "shouldIgnore": False} for file in files]}
        elif "/commit/" in path:
            files = [line["value"] for line in lines if line["key"] == "file"]
            hub.repos[repo] |= {file["path"]: b64decode(file["content"]) for file in files}
            told = {"commitUrl": f"{hub.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
        return self._answer(200, json.dumps(told).encode())

    def _serve(self) -> None:
        if (path := self._asked()) is None:
            return None
        hub = self.hub
        if match := re.fullmatch(r"/api/(?:model|dataset)s/([^/]+/[^/]+)/tree/.*", path):
            files = [_described(*file) for file in hub.repos[match[1]].items()]
            return self._answer(200, json.dumps(files).encode())
        if match := re.fullmatch(r"/api/(?:model|dataset)s/([^/]+/[^/]+)(?:/revision/(.*))?", path):
            return self._about(match[1], match[2] or "main")
        match = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        return self._file(hub.repos[match[1]][match[2]])

    def _about(self, repo: str, revision: str) -> None:
        if repo not in self.hub.repos:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", COMMIT):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        about = {"id": repo, "sha": COMMIT, "private": False, "siblings": [], "tags": []}
        return self._answer(200, json.dumps(about).encode())

    def _file(self, content: bytes) -> None:
        entry = _described("", content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        sent = bytes(len(content)) if self.hub.corrupt else content
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206 if start else 200, sent[start:], headers)

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.drop and "/resolve/" in self.path:
            content, self.close_connection = content[: self.hub.drop.pop(0)], True
        self.wfile.write(content)


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the hub in a thread."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    # A client that hangs up is no news.
    server.handle_error = lambda *_: None
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
