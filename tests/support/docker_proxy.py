"""A Unix socket in front of the Docker daemon's, on which things go wrong as a test says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

DAEMON = "/var/run/docker.sock"


@dataclass
class Rule:
    """What becomes of requests whose first line matches: an answer of ours, or a wait."""

    pattern: str
    answer: bytes = b""
    """Sent instead of asking the daemon; empty = the request is held back until the rule is lifted."""
    after: bool = False
    """The daemon gets the request; it is its answer that is held back."""
    lifted: threading.Event = field(default_factory=threading.Event)
    seen: list[str] = field(default_factory=list)


class Proxy:
    """Passes everything on, until told otherwise."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "docker.sock"
        self.environ = {"DOCKER_HOST": f"unix://{self.path}"}
        self._rules: list[Rule] = []
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.mend()

    def hang(self, pattern: str = ".*", after: bool = False) -> Rule:
        """Requests that match (`METHOD /path`) get no answer until the rule is lifted."""
        rule = Rule(pattern, after=after)
        self._rules.append(rule)
        return rule

    def answer(self, pattern: str, status: int, body: object) -> Rule:
        """Requests that match get this answer: JSON, or a stream of lines for a list."""
        head = f"HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\n"
        if isinstance(body, list):
            lines = [json.dumps(line) + "\n" for line in body]
            head += "Transfer-Encoding: chunked\r\n\r\n"
            text = "".join(f"{len(line):x}\r\n{line}\r\n" for line in lines) + "0\r\n\r\n"
        else:
            text = json.dumps(body)
            head += f"Content-Length: {len(text)}\r\n\r\n"
        rule = Rule(pattern, (head + text).encode())
        self._rules.append(rule)
        return rule

    def lift(self) -> None:
        """All rules end; what was held back goes on."""
        rules, self._rules = self._rules, []
        for rule in rules:
            rule.lifted.set()

    def cut(self) -> None:
        """As when the daemon is stopped: connections end, and there is no socket."""
        self.path.unlink(missing_ok=True)
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """The daemon is back."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        """The end."""
        self.lift()
        self.cut()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        daemon = socket.socket(socket.AF_UNIX)
        self._open |= {client, daemon}
        flow = threading.Event()
        flow.set()
        with contextlib.suppress(OSError), client, daemon:
            daemon.connect(DAEMON)
            back = threading.Thread(target=self._back, args=(daemon, client, flow), daemon=True)
            back.start()
            while request := _request(client):
                line = request.split(b" HTTP/", 1)[0].decode()
                rule = next((one for one in self._rules if re.search(one.pattern, line)), None)
                if rule is not None:
                    rule.seen.append(line)
                if rule is not None and rule.answer:
                    client.sendall(rule.answer)
                    continue
                if rule is not None and rule.after:
                    flow.clear()
                    threading.Thread(target=_release, args=(rule.lifted, flow), daemon=True).start()
                elif rule is not None:
                    rule.lifted.wait()
                daemon.sendall(request)
            daemon.shutdown(socket.SHUT_RDWR)
            back.join(5)
        self._open -= {client, daemon}

    def _back(self, daemon: socket.socket, client: socket.socket, flow: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := daemon.recv(65536):
                flow.wait()
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)


def _release(lifted: threading.Event, flow: threading.Event) -> None:
    lifted.wait()
    flow.set()


def _request(client: socket.socket) -> bytes:
    """One whole request; empty at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(65536)
        if not more:
            return b""
        data += more
    head, _, _ = data.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    wanted = len(head) + 4 + (int(found[1]) if found else 0)
    while len(data) < wanted:
        data += client.recv(65536)
    return data


def environ_through(proxy: Proxy) -> dict[str, str]:
    """This process' environment, with the proxy for the daemon."""
    return {**os.environ, **proxy.environ}
