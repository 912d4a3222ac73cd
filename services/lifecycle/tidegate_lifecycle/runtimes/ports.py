"""Free ports for model servers."""

from __future__ import annotations

import socket
from collections.abc import Collection

PROMISE = 60.0
"""Seconds for which a port isn't given again: a server that is starting hasn't bound it yet."""


class Ports:
    """Gives ports that are free now, each once a minute at most."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._promised: dict[int, float] = {}

    def allocate(self, taken: Collection[int], now: float) -> int:
        """A port that nobody listens on, that isn't in `taken` and wasn't given in the last minute.

        Another program may still take it before the server does: then that start fails, and the next try
        gets another port. OSError when the system has none left.
        """
        self._promised = {port: until for port, until in self._promised.items() if until > now}
        with_held: list[socket.socket] = []  # unfit ports stay bound, so that the kernel offers others
        try:
            while True:
                listener = socket.socket()
                with_held.append(listener)
                listener.bind((self._host, 0))
                port: int = listener.getsockname()[1]
                if port not in taken and port not in self._promised:
                    self._promised[port] = now + PROMISE
                    return port
        finally:
            for listener in with_held:
                listener.close()
