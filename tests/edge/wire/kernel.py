"""Connections as the kernel knows them: plain sockets that nobody reads, and what waits in their queues."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

_ESTABLISHED = "01"


def silent(port: int, receive_buffer: int = 4096) -> socket.socket:
    """A connection that nothing reads, with a small buffer of its own."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(("127.0.0.1", port))
    return sock


def many(port: int, count: int) -> list[socket.socket]:
    """So many connections."""
    allow_files(count + 1000)
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]


def allow_files(wanted: int) -> None:
    """This process may have so many open files, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def queues(port: int) -> dict[int, int]:
    """Bytes in the send queue of each established connection of a server, by the client's port."""
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, sizes = line.split()[:5]
        if state == _ESTABLISHED and int(local.split(":")[1], 16) == port:
            found[int(remote.split(":")[1], 16)] = int(sizes.split(":")[0], 16)
    return found
