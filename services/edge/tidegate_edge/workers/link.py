"""Messages between the master and one worker, both ways. The end of the link is the other one's end."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import Callable
from typing import Any

import orjson

_LENGTH = struct.Struct("!I")
_LONGEST = 64 * 2**20
"""Bytes of a message."""

Message = dict[str, Any]


class Link:
    """One end. A message is a JSON object; `asked` answers a question of the other side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._over = False

    @classmethod
    async def over(cls, sock: socket.socket) -> Link:
        """A link over one end of a socket pair, which is then the link's."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        writer.transport.set_write_buffer_limits(high=0)  # `said` waits for every byte
        return cls(reader, writer)

    def say(self, **message: Any) -> None:
        """Sends a message; into the void when the other side is gone."""
        if not self._writer.is_closing():
            data = orjson.dumps(message)
            self._writer.write(_LENGTH.pack(len(data)) + data)

    async def ask(self, what: str, patience: float) -> Any:
        """The other side's answer; None when there is none within `patience` seconds. `hear` must run."""
        if self._over:
            return None
        number = next(self._numbers)
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        self.say(ask=what, number=number)
        try:
            return await asyncio.wait_for(answer, patience)
        except TimeoutError:
            return None
        finally:
            del self._questions[number]

    async def hear(self, take: Callable[[Message], None]) -> None:
        """Takes messages until the other side is gone. Answers of questions go to who has asked."""
        try:
            while True:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if length > _LONGEST:
                    return
                message: Message = orjson.loads(await self._reader.readexactly(length))
                if "answer" in message:
                    question = self._questions.get(message["number"])
                    if question is not None and not question.done():
                        question.set_result(message["answer"])
                else:
                    take(message)
        except (asyncio.IncompleteReadError, OSError):
            return
        finally:
            self._over = True
            for question in self._questions.values():
                if not question.done():
                    question.set_result(None)

    async def said(self, patience: float) -> None:
        """Waits up to `patience` seconds for the other side to take what was said."""
        try:
            async with asyncio.timeout(patience):
                await self._writer.drain()
        except (TimeoutError, OSError):
            return

    def close(self) -> None:
        """Ends it. May be called again."""
        self._writer.close()
