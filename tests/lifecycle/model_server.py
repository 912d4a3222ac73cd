"""A tiny model server for tests: HTTP on a port, ready after a while, or failing at start as told."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def take(use: Path, cards: list[str], mib: int) -> None:
    """As vLLM does: a child holds the memory, and ends with its parent."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    for card in cards:
        (use / f"{card}.{child.pid}").write_text(f"{mib}\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--load", type=float, default=0.0, help="seconds until /health answers 200")
    parser.add_argument("--exit", type=int, default=None, help="end at once with this status")
    parser.add_argument("--exit-until", type=Path, help="end with 3 while this file does not exist")
    parser.add_argument("--starts", type=Path, help="a line is added here at each start")
    parser.add_argument("--use", type=Path, help="pretended cards: a child takes --hold of each --on")
    parser.add_argument("--hold", type=int, default=0, help="MiB")
    parser.add_argument("--on", default="", help="cards, with commas")
    parser.add_argument("--last-words", help="say this and end with 1, as often as --failures tells")
    parser.add_argument("--failures", type=int, default=sys.maxsize, help="starts that fail, by --starts")
    parser.add_argument("--killed-after", type=float, help="seconds until it is killed, as by the kernel")
    parser.add_argument("--stop-time", type=float, default=0.0, help="seconds from SIGTERM to its end")
    parser.add_argument("--metrics", type=Path, help="what /metrics answers, read each time")
    arguments = parser.parse_args()
    if arguments.starts:
        with arguments.starts.open("a") as file:
            file.write("start\n")
    if arguments.exit is not None or (arguments.exit_until and not arguments.exit_until.exists()):
        sys.stderr.write("RuntimeError: the weights in /secret/models/w.bin are damaged\n")
        sys.exit(arguments.exit if arguments.exit is not None else 3)
    if arguments.use:
        take(arguments.use, arguments.on.split(","), arguments.hold)
    if arguments.last_words and len(arguments.starts.read_text().splitlines()) <= arguments.failures:
        sys.stderr.write(f"{arguments.last_words}\n")
        sys.exit(1)
    if arguments.killed_after is not None:
        threading.Timer(arguments.killed_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    ready_at = time.monotonic() + arguments.load

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = 200 if time.monotonic() >= ready_at else 503, b"ok"
            if self.path == "/metrics" and arguments.metrics:
                body = arguments.metrics.read_bytes()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)

    def end(*_: object) -> None:
        """Closes its port, and takes its time to end."""
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, end)
    server.serve_forever(0.02)
    server.server_close()
    threading.Event().wait(arguments.stop_time)


if __name__ == "__main__":
    main()
