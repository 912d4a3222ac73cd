"""Where request bodies are kept until a model server has them: small ones in memory, large ones in files
without a name. The loop never waits for the disk: whatever touches it runs in a thread.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from typing import TypeVar

import structlog

from tidegate_edge.envelope import Failure
from tidegate_edge.request import Edit, splice

log = structlog.get_logger("tidegate.edge")

_BATCH = 128 * 1024
"""Bytes that are written, and read, at a time."""
_THREADS = 4

_T = TypeVar("_T")


class Held:
    """What is held of one kind now, by whom, and its size together. The sum changes only with the table."""

    def __init__(self, limit: int, words: str) -> None:
        self.limit = limit
        """Bytes."""
        self.total = 0
        self._words = words
        self._sizes: dict[Hashable, int] = {}

    def hold(self, owner: Hashable, size: int) -> None:
        """`owner` now holds `size` bytes. Raises Failure (503) when that is too much (and holds them)."""
        self.total += size - self._sizes.get(owner, 0)
        self._sizes[owner] = size
        if self.total > self.limit:
            raise Failure("server_is_overloaded", self._words)

    def drop(self, owner: Hashable) -> None:
        """`owner` holds nothing any more. May be called again."""
        self.total -= self._sizes.pop(owner, 0)


class Spools:
    """What all bodies share: the limits, the folder and the threads."""

    def __init__(self, folder: str, above: int, most_in_memory: int, most_on_disk: int) -> None:
        """`folder`: for files, empty = the system's. `above`: bytes of a body from which on it is in a file.
        `most_...`: bytes of all together."""
        self.folder = folder or None
        self.above = above
        self.memory = Held(most_in_memory, "Too many request bodies are waiting; try again soon.")
        self.disk = Held(most_on_disk, "Too many large request bodies are waiting on disk; try again soon.")
        self._threads = ThreadPoolExecutor(_THREADS, "spool")

    async def run(self, work: Callable[[], _T]) -> _T:
        """Runs `work` in a thread. Raises Failure (503) for what the disk says."""
        try:
            return await asyncio.wrap_future(self._threads.submit(work))
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            log.error(
                "a large request body can't be kept on disk; see edge.spool_dir",
                folder=self.folder or tempfile.gettempdir(),
                reason=reason,
            )
            words = f"A request body as large as this one is kept on disk, which can't be done now: {reason}."
            raise Failure("server_is_overloaded", words, retry_after=30) from None

    def later(self, work: Callable[[], None]) -> None:
        """Runs `work` in a thread some time. Synchronous."""
        self._threads.submit(work)


class _File:
    """A file without a name, made when it is needed. Its methods run in threads, one at a time: the number of
    a file that is closed may be another's next, so nobody may be at it then."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._raw: FileIO | None = None
        self._closed = False
        self._turn = threading.Lock()

    def append(self, data: bytes) -> None:
        with self._turn:
            if self._closed:
                return
            if self._raw is None:
                self._raw = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115 - see close
            rest = memoryview(data)
            while rest:
                rest = rest[self._raw.write(rest) :]

    def read(self, at: int, size: int) -> bytes:
        with self._turn:
            found = os.pread(self._raw.fileno(), size, at) if self._raw and not self._closed else b""
        if not found:
            raise OSError("the file is shorter than it was")
        return found

    def close(self) -> None:
        with self._turn:
            self._closed = True
            if self._raw is not None:
                self._raw.close()


class Stored:
    """A body in a file, which can be read as often as need be."""

    def __init__(self, spools: Spools, file: _File, size: int) -> None:
        self._spools = spools
        self._file = file
        self._size = size

    def __len__(self) -> int:
        return self._size

    def spliced(self, edits: list[Edit]) -> Pieces:
        """The body with changes, which are in the order of their places and don't overlap."""
        return Pieces(self, edits)

    async def between(self, begin: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of it, some at a time. Raises Failure."""
        while begin < end:
            at, size = begin, min(_BATCH, end - begin)
            found = await self._spools.run(lambda: self._file.read(at, size))  # noqa: B023 - awaited at once
            begin += len(found)
            yield found


class Pieces:
    """A stored body as it is sent: its length is known, and it can be walked again and again."""

    def __init__(self, stored: Stored, edits: list[Edit]) -> None:
        self._stored = stored
        self._edits = edits

    def __len__(self) -> int:
        return len(self._stored) + sum(len(new) - (end - begin) for begin, end, new in self._edits)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        at = 0
        for begin, end, new in self._edits:
            async for piece in self._stored.between(at, begin):
                yield piece
            if new:
                yield new
            at = end
        async for piece in self._stored.between(at, len(self._stored)):
            yield piece


Content = bytes | Stored


def outgoing(content: Content, edits: list[Edit]) -> bytes | Pieces:
    """A body with its changes, as it is sent."""
    return splice(content, edits) if isinstance(content, bytes) else content.spliced(edits)


class Spool:
    """Takes one body, piece by piece."""

    def __init__(self, spools: Spools) -> None:
        self._spools = spools
        self._pieces: list[bytes] = []
        self._unwritten = 0
        self._file: _File | None = None
        self.size = 0
        """Bytes so far."""

    async def put(self, piece: bytes) -> None:
        """The next bytes. Waits for the disk, if they go there. Raises Failure (503)."""
        self._pieces.append(piece)
        self._unwritten += len(piece)
        self.size += len(piece)
        self._spools.memory.hold(self, self._unwritten)
        if self.size > self._spools.above and (self._file is None or self._unwritten >= _BATCH):
            await self._write()

    async def whole(self) -> Content:
        """There are no more: the body. Raises Failure (503)."""
        if self._file is None:
            return self.joined()
        if self._pieces:
            await self._write()
        return Stored(self._spools, self._file, self.size)

    def joined(self) -> bytes:
        """A body that is in memory as a whole."""
        if len(self._pieces) != 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]

    def forget(self) -> None:
        """What is in memory isn't needed any more. Synchronous."""
        self._pieces = []
        self._spools.memory.drop(self)

    def close(self) -> None:
        """Gives everything up, the file too. Synchronous; may be called again."""
        self.forget()
        if self._file is not None:
            self._spools.later(self._file.close)
            self._file = None
        self._spools.disk.drop(self)

    async def _write(self) -> None:
        self._spools.disk.hold(self, self.size)
        if self._file is None:
            self._file = _File(self._spools.folder)
        file, data = self._file, b"".join(self._pieces)
        self._pieces, self._unwritten = [], 0
        await self._spools.run(lambda: file.append(data))
        self._spools.memory.hold(self, self._unwritten)
