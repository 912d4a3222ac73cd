"""What has to be done to sockets that granian owns, by their file descriptors. Blocks: use a thread."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

_SEND_BUFFER = 128 * 1024
"""The kernel doubles it: what a client that doesn't read may leave in the kernel, per connection."""


def free_address(listen: str) -> tuple[str, int, str]:
    """Where to bind, as (ip, port), or why it can't be done (third, else empty).

    Bound without SO_REUSEPORT on purpose: granian binds with it, and a second program on the same port
    would silently get half of the connections.
    """
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        return "", 0, f"{host} is no address of this machine ({error.strerror})"
    family, kind, protocol, _, address = min(found, key=lambda item: item[0] != socket.AF_INET)
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            return "", 0, f"can't listen on {listen} ({error.strerror}); `ss -ltnp` shows who does"
        bound = probe.getsockname()
        return str(bound[0]), int(bound[1]), ""


def bound_send_buffers(port: int) -> None:
    """Bounds what the kernel buffers for each client; accepted connections inherit it from the listener."""
    for own in _sockets():
        with contextlib.suppress(OSError):
            listening = own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listening and own.getsockname()[1] == port:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


def hang_up(client: tuple[str, int]) -> None:
    """Shuts a client's connection down. granian keeps one open whose client takes nothing, even after the
    application has failed, until that client goes away."""
    for own in _sockets():
        with contextlib.suppress(OSError):
            if tuple(own.getpeername()[:2]) == client:
                own.shutdown(socket.SHUT_RDWR)


def _sockets() -> Iterator[socket.socket]:
    """Duplicates of this process's TCP sockets, so that nothing is done to a descriptor used anew."""
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptor = os.dup(int(name))
        except OSError:
            continue
        try:
            own = socket.socket(fileno=descriptor)
        except OSError:
            os.close(descriptor)
            continue
        with own:
            if own.family in (socket.AF_INET, socket.AF_INET6) and own.type == socket.SOCK_STREAM:
                yield own
