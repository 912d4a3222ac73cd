"""Faults carried out on a connection or on the process."""

from __future__ import annotations

import asyncio
import os
from typing import NoReturn

from aiohttp import web

from tidegate_simulator.errors import Cut, Refusal
from tidegate_simulator.faults import Fault

_GARBAGE = b"\x00\xff\xfeSSH-2.0-not_http\r\n\x7f\r\n\r\n"
_HALF_ANSWER = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 4096\r\n\r\n{"id":"'
# Its three bytes stand for every character that a careless reader decodes in pieces.
TORN_CHARACTER = "€"


async def before_handling(fault: Fault, request: web.Request) -> None:
    """Strikes a request that no handler has seen. Returns only if the handling is to go on."""
    match fault.fault:
        case "refuse":
            cut(request)
        case "garbage":
            cut(request, _GARBAGE)
        case "hang":
            await forever()
        case "status":
            raise Refusal(fault.code, "This error was asked for.", retry_after=fault.retry_after)
        case "slow-headers":
            await asyncio.sleep(fault.delay)


async def within_whole_answer(fault: Fault, request: web.Request) -> None:
    """Strikes in the middle of an answer that isn't a stream."""
    match fault.fault:
        case "die-after":
            die()
        case "stall-after":
            await forever()
        case "error-after":
            raise Refusal(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")
        case _:
            cut(request, _HALF_ANSWER)


def cut(request: web.Request, last: bytes = b"") -> NoReturn:
    """Breaks the connection, after these bytes. Raises Cut."""
    transport = request.transport
    if transport is not None:
        if last:
            transport.write(last)
            transport.close()
        else:
            transport.abort()
    raise Cut


def die() -> NoReturn:
    """Ends the process at once, as a crash does: nothing is flushed, closed or given back."""
    os._exit(1)


async def forever() -> None:
    """Never returns; ends with the client's or the server's going."""
    await asyncio.get_running_loop().create_future()
