"""A model hub of our own, over real HTTP, on which things go wrong as a test says.

It answers what the hub's library asks: /api/models/REPO[/revision/REV], /api/models/REPO/tree/REV, and
/REPO/resolve/REV/FILE. Large files are redirected to a second host, as the real hub does: there a token must
not show up. Other paths are plain files: for downloads by URL.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".gguf", ".safetensors", ".bin")
_CHUNK = 1 << 14


@dataclass
class Fault:
    """What becomes of the next transfers of one file."""

    cut: list[int] = field(default_factory=list)
    """Each transfer takes one: the connection is cut after so many bytes of it."""
    wrong: int = 0
    """So many transfers carry other bytes of the same length."""
    statuses: list[int] = field(default_factory=list)
    """Each request takes one and gets no more than this status."""
    hold_after: int | None = None
    """Transfers stop here, of the whole file's bytes, until `go` is set."""
    go: threading.Event = field(default_factory=threading.Event)
    swap: bytes | None = None
    """After the first transfer the file has this content."""
    etag: str = ""
    """Told instead of the content's own."""
    no_range: bool = False
    """Transfers begin at the start, whatever was asked for."""


class _Server(ThreadingHTTPServer):
    """Knows its connections, so that closing it closes them."""

    def __init__(self, host: str, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__((host, 0), handler)
        self.open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is none of ours."""

    def cut(self) -> None:
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Hub:
    """Repositories, plain files, faults, and what was asked and served."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: dict[str, str] = {}
        """The token that a repository wants."""
        self.plain: dict[str, bytes] = {}
        """By path."""
        self.faults: dict[str, Fault] = {}
        """By a file's name in its repository, or a plain path; "api" for listings."""
        self.requests: list[tuple[str, str, str]] = []
        """Method, path, Range."""
        self.leaked: list[str] = []
        """Tokens that the second host was shown."""
        self.served: dict[str, int] = {}
        """Bytes of content by file."""
        self._lock = threading.Lock()
        self._servers = [_Server(host, self._handler()) for host in ("127.0.0.1", "127.0.0.2")]
        self.url, self.far = (f"http://{s.server_address[0]!s}:{s.server_address[1]}" for s in self._servers)
        self._threads = [threading.Thread(target=s.serve_forever, args=(0.05,)) for s in self._servers]

    @contextlib.contextmanager
    def running(self) -> Iterator[Hub]:
        """Serves, for a block."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self.close()

    def close(self) -> None:
        """Nobody answers any more."""
        for fault in self.faults.values():
            fault.go.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            if thread.is_alive():
                server.shutdown()
                server.cut()
                thread.join()
            server.server_close()

    def fault(self, file: str) -> Fault:
        """The faults of a file, to be set."""
        return self.faults.setdefault(file, Fault())

    def commit(self, repo: str) -> str:
        """Of a repository: changes with its content."""
        state = hashlib.sha1(usedforsecurity=False)
        for path, content in sorted(self.repos[repo].items()):
            state.update(path.encode() + b"\0" + content)
        return state.hexdigest()

    def transfers(self, file: str) -> int:
        """How often its content was asked for."""
        return sum(
            method == "GET" and "/api/" not in path and path.endswith(file)
            for method, path, _ in self.requests
        )

    def content(self, repo: str, path: str) -> bytes | None:
        """A file of a repository, if there is one."""
        return self.repos.get(repo, {}).get(path)

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the request
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self)

            def do_GET(self) -> None:
                hub._answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
                pass

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        with self._lock:
            self.requests.append((request.command, path, request.headers.get("Range", "")))
        with contextlib.suppress(ConnectionError):
            if path in self.plain:
                self._send(request, path, self.plain[path])
            elif path.startswith("/api/models/"):
                self._api(request, path.removeprefix("/api/models/"))
            elif "/resolve/" in path:
                repo, _, rest = path[1:].partition("/resolve/")
                self._resolve(request, repo, rest.partition("/")[2])
            elif path.startswith("/far/"):
                if token := request.headers.get("Authorization"):
                    self.leaked.append(token)
                repo, _, name = path.removeprefix("/far/").partition("//")
                self._send(request, name, self.repos[repo][name])
            else:
                self._say(request, 404)

    def _api(self, request: BaseHTTPRequestHandler, rest: str) -> None:
        statuses = self.fault("api").statuses
        if statuses:
            self._say(request, statuses.pop(0))
            return
        repo = "/".join(rest.split("/")[:2])
        if repo not in self.repos:
            self._say(request, 401 if "Authorization" not in request.headers else 404, "RepoNotFound")
            return
        files = sorted(self.repos[repo].items())
        if "/tree/" in rest:
            self._json(request, [_entry(path, content) for path, content in files])
        else:
            siblings = [_sibling(path, content) for path, content in files]
            self._json(request, {"id": repo, "sha": self.commit(repo), "siblings": siblings})

    def _resolve(self, request: BaseHTTPRequestHandler, repo: str, path: str) -> None:
        fault, content = self.fault(path), self.content(repo, path)
        wants = self.gated.get(repo)
        commit = {"X-Repo-Commit": self.commit(repo)} if repo in self.repos else {}
        if fault.statuses:
            self._say(request, fault.statuses.pop(0))
        elif wants is not None and request.headers.get("Authorization") != f"Bearer {wants}":
            self._say(request, 403 if "Authorization" in request.headers else 401, "GatedRepo", commit)
        elif content is None:
            self._say(request, 404, "EntryNotFound" if commit else "RepoNotFound", commit)
        elif path.endswith(LARGE):
            headers = {"Location": f"{self.far}/far/{repo}//{path}", "Content-Length": "0"}
            etag = fault.etag or _sha256(content)
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{etag}"'}
            self._head(request, 302, headers | linked | commit)
        else:
            self._send(request, path, content, commit)

    def _send(
        self, request: BaseHTTPRequestHandler, name: str, content: bytes, more: dict[str, str] | None = None
    ) -> None:
        """The content from where it is asked for, as far as its fault lets it."""
        fault = self.fault(name)
        if fault.statuses:
            self._say(request, fault.statuses.pop(0))
            return
        etag = _sha256(content) if name.endswith(LARGE) else _git(content)
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **(more or {})}
        start, end = _range(request.headers.get("Range", ""), len(content))
        if_range = request.headers.get("If-Range", headers["ETag"])
        if start is None or fault.no_range or if_range != headers["ETag"]:
            status, start, end = 200, 0, len(content)
        elif start >= end:
            self._head(
                request, 416, headers | {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}
            )
            return
        else:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._head(request, status, headers | {"Content-Length": str(end - start)})
        if request.command == "GET":
            self._body(request, name, content[:end], start, fault)

    def _body(
        self, request: BaseHTTPRequestHandler, name: str, content: bytes, start: int, fault: Fault
    ) -> None:
        with self._lock:
            cut = fault.cut.pop(0) if fault.cut else len(content)
            if fault.wrong:
                fault.wrong -= 1
                content = content[:start] + bytes(byte ^ 0xFF for byte in content[start:])
            if fault.swap is not None and name in self.plain:
                self.plain[name] = fault.swap
        stop = min(start + cut, len(content))
        while start < stop:
            if fault.hold_after is not None and start >= fault.hold_after:
                fault.go.wait(60)
            bound = (
                stop if fault.hold_after is None or fault.go.is_set() else max(fault.hold_after, start + 1)
            )
            piece = content[start : min(start + _CHUNK, bound, stop)]
            request.wfile.write(piece)
            start += len(piece)
            with self._lock:
                self.served[name] = self.served.get(name, 0) + len(piece)
        if stop < len(content):
            request.close_connection = True
            request.wfile.flush()
            request.connection.close()

    def _json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        body = json.dumps(value).encode()
        self._head(request, 200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if request.command == "GET":
            request.wfile.write(body)

    def _say(
        self, request: BaseHTTPRequestHandler, status: int, code: str = "", more: dict[str, str] | None = None
    ) -> None:
        error = {"X-Error-Code": code} if code else {}
        self._head(request, status, {"Content-Length": "0", **error, **(more or {})})

    def _head(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()


def _range(text: str, size: int) -> tuple[int | None, int]:
    start, _, last = text.removeprefix("bytes=").partition("-")
    return int(start) if start.isdecimal() else None, min(size, int(last) + 1) if last.isdecimal() else size


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _lfs(path: str, content: bytes) -> dict[str, object]:
    if not path.endswith(LARGE):
        return {}
    return {"lfs": {"size": len(content), "sha256": _sha256(content), "pointerSize": 134}}


def _sibling(path: str, content: bytes) -> dict[str, object]:
    return {"rfilename": path, "size": len(content), "blobId": _git(content), **_lfs(path, content)}


def _entry(path: str, content: bytes) -> dict[str, object]:
    lfs = {"lfs": {"size": len(content), "oid": _sha256(content), "pointerSize": 134}}
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git(content)}
    return {**entry, **(lfs if path.endswith(LARGE) else {})}
