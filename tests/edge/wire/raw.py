"""A client of raw bytes: it sends what no library would, and reads answers as strictly as RFC 9112 allows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

CHAT = b"/v1/chat/completions"
BODY = b'{"model":"small"}'
LAST = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
"""Sent behind each case: answered where the case was read as a request that leaves the connection in order,
and not where it was refused. So the server always closes, and no test waits to see that nothing comes."""
MARK = b"SMUGGLED"
PATIENCE = 20.0
"""Seconds for an answer, or for a close."""

_STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [\x20-\x7e]*")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)?")
_IDENTITY = re.compile(r"[A-Za-z0-9._-]{1,128}")
_INTERNALS = re.compile(r"Traceback|tidegate_|\.py\b|0x[0-9a-f]{6}|/usr/|/home/|/tmp/|Error\(|object at")


def post(*fields: bytes, body: bytes = BODY, path: bytes = CHAT, length: bool = True) -> bytes:
    """A POST with these fields beside host and content-length."""
    lines = [b"POST %s HTTP/1.1" % path, b"host: x", *fields]
    if length:
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(*pieces: bytes, field: bytes = b"transfer-encoding: chunked") -> bytes:
    """A POST whose body is these bytes as they are, chunk sizes and all."""
    return post(field, body=b"", length=False) + b"".join(pieces)


HIDDEN = post(body=b'{"model":"small","x":"%s"}' % MARK)
"""A request that is only ever the inside of another one."""


@dataclass
class Reply:
    """One answer."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """A field's value; None = it isn't there."""
        values = [value for key, value in self.fields if key == name]
        assert len(values) < 2, f"{name} is there twice"
        return values[0] if values else None

    @property
    def error(self) -> dict[str, Any]:
        """The inner object of the envelope, once everything about it is right."""
        assert self.header("content-type") == "application/json", self
        data = json.loads(self.body)
        assert set(data) == {"error"}, self
        inner: dict[str, Any] = data["error"]
        assert set(inner) == {"message", "type", "param", "code"}, self
        message = inner["message"]
        assert isinstance(message, str), self
        assert 0 < len(message) <= 500, self
        assert message.isprintable(), self
        assert not _INTERNALS.search(message), self
        assert isinstance(inner["type"], str), self
        assert isinstance(inner["code"], str), self
        assert inner["param"] is None or isinstance(inner["param"], str), self
        assert _IDENTITY.fullmatch(self.header("x-request-id") or ""), self
        after = self.header("retry-after")
        if self.status in (429, 503):
            assert after is not None, self
            assert 1 <= int(after) <= 120, self
        return inner


@dataclass
class Talk:
    """Everything that came back on one connection until the server closed it."""

    answers: list[Reply]
    interim: list[int] = field(default_factory=list)
    """Status codes of 1xx answers."""
    reset: bool = False
    """It was not closed in good order, or the last answer was cut off."""

    @property
    def statuses(self) -> list[int]:
        """Of all answers, in order."""
        return [answer.status for answer in self.answers]


class Wire:
    """A connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.interim: list[int] = []

    @classmethod
    async def to(cls, port: int, tls: ssl.SSLContext | None = None) -> Wire:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**20, ssl=tls))

    async def say(self, *pieces: bytes) -> None:
        """Sends pieces, each by itself, until the other side takes no more."""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.writer.write(piece)
                await self.writer.drain()
                await asyncio.sleep(0)

    async def answer(self, head: bool = False) -> Reply:
        """The next answer that is final. Raises IncompleteReadError, with nothing read at a proper end."""
        while True:
            reply = await self._head()
            if reply.status >= 200:
                break
            self.interim.append(reply.status)
        coding, length = reply.header("transfer-encoding"), reply.header("content-length")
        assert coding is None or length is None, reply
        if head or reply.status in (204, 304):
            return reply
        if coding is not None:
            assert coding == "chunked", reply
            while piece := await self._chunk():
                reply.body += piece
        elif length is not None:
            assert length.isdigit(), reply
            reply.body = await self._exactly(int(length))
        else:
            assert reply.header("connection") == "close", reply
            reply.body = await asyncio.wait_for(self.reader.read(-1), PATIENCE)
        return reply

    async def _head(self) -> Reply:
        lines = []
        while (line := await asyncio.wait_for(self.reader.readuntil(b"\r\n"), PATIENCE)) != b"\r\n":
            lines.append(line[:-2])
        first = _STATUS.fullmatch(lines[0])
        assert first is not None, lines
        fields = []
        for one in lines[1:]:
            found = _FIELD.fullmatch(one)
            assert found is not None, lines
            fields.append((found[1].lower().decode(), (found[2] or b"").decode()))
        return Reply(int(first[1]), fields)

    async def _chunk(self) -> bytes:
        line = await asyncio.wait_for(self.reader.readuntil(b"\r\n"), PATIENCE)
        data = await self._exactly(int(line, 16) + 2)
        assert data.endswith(b"\r\n"), data
        return data[:-2]

    async def _exactly(self, count: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(count), PATIENCE)

    async def rest(self) -> Talk:
        """All answers until the server has closed."""
        talk = Talk([], self.interim)
        try:
            while True:
                talk.answers.append(await self.answer())
        except asyncio.IncompleteReadError as end:
            talk.reset = bool(end.partial)
        except ConnectionError:
            talk.reset = True
        return talk

    async def closed(self) -> None:
        """Closes, and waits until that is done."""
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def talk(port: int, pieces: Iterable[bytes], tls: ssl.SSLContext | None = None) -> Talk:
    """Sends the pieces on a connection of their own while it reads what comes, until the server closes."""
    wire = await Wire.to(port, tls)
    sending = asyncio.ensure_future(wire.say(*pieces))
    try:
        return await wire.rest()
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await wire.closed()
