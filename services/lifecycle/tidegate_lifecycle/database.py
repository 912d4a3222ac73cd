"""A SQLite file (WAL, every commit synced) that one thread uses: checked when opened, put aside when
damaged."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")

JOURNALS = ("-wal", "-shm")
"""What belongs to a file and lies beside it."""


class Database:
    """The file and its thread. What isn't async is to be called in the thread, through `do`."""

    def __init__(self, path: Path, tables: str, queries: Sequence[str]) -> None:
        self.path = path
        self._tables, self._queries = tables, tuple(queries)
        self._thread = ThreadPoolExecutor(1, f"tidegate-{path.stem}")
        self._connection: sqlite3.Connection | None = None

    async def do(self, function: Callable[..., _T], *args: object) -> _T:
        """Runs it in the thread; calls are carried out one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def shut(self) -> None:
        """Closes the file and ends the thread, when what was asked of it is done."""
        await self.do(self.close)
        await asyncio.to_thread(self._thread.shutdown)

    # In the thread

    @property
    def connection(self) -> sqlite3.Connection:
        """The open file; RuntimeError when it isn't."""
        if self._connection is None:
            raise RuntimeError("the store is not open")
        return self._connection

    @property
    def opened(self) -> bool:
        """It is open."""
        return self._connection is not None

    def open(self) -> None:
        """Opens and checks. OperationalError: it can't be used; another DatabaseError: it is damaged, or
        none of ours."""
        self._connection = connect(self.path, self._tables, self._queries)

    def close(self) -> None:
        """Closes the file, if it is open."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def connect(path: Path, tables: str, queries: Sequence[str]) -> sqlite3.Connection:
    """Opens and checks a file; see `Database.open`."""
    connection = sqlite3.connect(path, timeout=5)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        found = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise sqlite3.DatabaseError(str(found[:1]))
        connection.executescript(tables)
        for query in queries:
            connection.execute(query).fetchall()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def put_aside(path: Path) -> str:
    """Renames a damaged file, and its journals with it: a journal beside a new file would damage that one.

    Returns the new name: with the time in UTC, and a number when that name is taken.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    kept, n = path.with_name(f"{path.name}.damaged-{stamp}"), 1
    while kept.exists():
        n += 1
        kept = path.with_name(f"{path.name}.damaged-{stamp}-{n}")
    for suffix in ("", *JOURNALS):
        part = path.with_name(path.name + suffix)
        if part.exists():
            os.replace(part, kept.with_name(kept.name + suffix))
    return kept.name


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, outlast a loss of power."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
