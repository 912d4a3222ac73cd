"""granian inside this process's loop, from a checked address to the last connection."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from tidegate_chassis.config import ConfigError, Problem
from tidegate_edge.sockets import bound_send_buffers, free_address

_BACKLOG = 1024
_START = 5.0
"""Seconds until granian must accept connections."""


class HttpServer:
    """Serves one ASGI application on one address."""

    def __init__(self, app: Any, listen: str) -> None:
        self._app = app
        self._listen = listen
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listens; returns the URL. Raises ConfigError when the address can't be had."""
        host, port, taken = await asyncio.to_thread(free_address, self._listen)
        if taken:
            raise ConfigError([Problem("edge.listen", taken)])
        self._server = await asyncio.to_thread(  # its constructor looks at the file system
            Server,
            self._app,
            host,
            port,
            interface=Interfaces.ASGINL,
            websockets=False,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(header_read_timeout=30_000, max_buffer_size=128 * 1024),
            backlog=_BACKLOG,
            backpressure=65_536,
            log_enabled=False,
        )
        self._task = asyncio.create_task(self._server.serve())
        await self._accepting(host, port)
        await asyncio.to_thread(bound_send_buffers, port)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def _accepting(self, host: str, port: int) -> None:
        assert self._task is not None, "it was started"
        try:
            async with asyncio.timeout(_START):
                while not self._task.done():
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_connection(host, port)
                        writer.close()
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pass
        raise ConfigError([Problem("edge.listen", f"can't listen on {self._listen}")])

    async def ended(self) -> None:
        """Returns when the server has ended by itself, which it should not."""
        assert self._task is not None, "it was started"
        await asyncio.wait({self._task})

    async def stop(self, patience: float) -> None:
        """Closes the port and all connections, within `patience` seconds."""
        if self._server is not None and self._task is not None:
            self._server.stop()
            await asyncio.wait({self._task}, timeout=patience)
