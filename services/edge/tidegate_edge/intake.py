"""A request's body on its way in: what it says is read as it comes, and the body is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

from tidegate_edge.multipart import Form, is_multipart
from tidegate_edge.request import LARGE, Said, read_json, scanned
from tidegate_edge.scanner import Scanner
from tidegate_edge.spool import Content, Pieces, Spool, Spools, outgoing

_SLICE = 16 * 1024
"""Bytes of a large body that are read at a time."""
_TURN = 0.002
"""Seconds that reading may take before others have their turn."""


class Body(NamedTuple):
    """A request's body, and what it says; None = nothing of it was read, and nothing is changed."""

    content: Content
    said: Said | None

    def outgoing(self, upstream_model: str, defaults: Mapping[str, bytes]) -> bytes | Pieces:
        """As it is sent to the model server. Raises Failure (400)."""
        return outgoing(self.content, self.said.edits(upstream_model, defaults) if self.said else [])


class Intake:
    """Takes one body. Small JSON is parsed at its end, everything else is read as it comes."""

    def __init__(self, spools: Spools, content_type: bytes, reads: bool = True) -> None:
        """`reads`: what the body says is wanted. Raises Failure (400)."""
        self.spool = Spool(spools)
        self._reads = reads
        form = reads and is_multipart(content_type)
        self._reader: Form | Scanner | None = Form(content_type) if form else None

    async def take(self, piece: bytes) -> None:
        """The next bytes. Raises Failure (400, 503)."""
        if self._reader is not None:
            await self._read(piece)
        elif self._reads and self.spool.size + len(piece) > LARGE:
            self._reader = Scanner()
            await self._read(self.spool.joined() + piece)
        await self.spool.put(piece)

    async def whole(self) -> Body:
        """There are no more. Raises Failure (400, 503)."""
        content = await self.spool.whole()
        if not self._reads:
            return Body(content, None)
        if isinstance(self._reader, Form):
            return Body(content, self._reader.finish())
        if isinstance(self._reader, Scanner):
            return Body(content, scanned(self._reader))
        assert isinstance(content, bytes), "what is parsed is in memory"
        return Body(content, read_json(content))

    async def _read(self, data: bytes) -> None:
        reader, now = self._reader, asyncio.get_running_loop().time
        assert reader is not None, "there is one"
        begun = now()
        for at in range(0, len(data), _SLICE):
            reader.feed(data[at : at + _SLICE])
            if now() - begun > _TURN:
                await asyncio.sleep(0)
                begun = now()
