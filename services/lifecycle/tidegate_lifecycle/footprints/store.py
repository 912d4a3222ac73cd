"""Where footprints are kept: a SQLite file of their own, and a copy of it that is made after each change.

A change is acknowledged when both are on the disk. So whatever is torn, by a crash at any instruction or by a
disk, one of them has all that was acknowledged. Each bears a seal: the number of its changes and a digest
over all rows, written with them. On opening, the file counts if its structure and its seal are right and the
copy hasn't seen more changes; else it is put aside and the copy takes its place.

A file of its own, beside lifecycle.db: that one is written with each change of admission's sessions, and
neither's damage costs the other's content.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

import structlog

from tidegate_lifecycle import metrics
from tidegate_lifecycle.database import JOURNALS, Database, put_aside, sync
from tidegate_lifecycle.footprints.record import Footprint

log = structlog.get_logger("tidegate.footprints")

NAME = "footprints.db"
BACKUP = f"{NAME}.backup"
_NEW = f"{NAME}.new"
_TABLES = """
CREATE TABLE IF NOT EXISTS footprints (
  model TEXT NOT NULL, signature TEXT NOT NULL, kind TEXT NOT NULL, count INTEGER NOT NULL,
  mib INTEGER NOT NULL, reserve_mib INTEGER NOT NULL, confidence REAL NOT NULL, samples INTEGER NOT NULL,
  source TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (model, signature)
);
CREATE TABLE IF NOT EXISTS seal (
  id INTEGER PRIMARY KEY CHECK (id = 1), changes INTEGER NOT NULL, digest TEXT NOT NULL
);
"""
_ROWS = (
    "SELECT model, signature, kind, count, mib, reserve_mib, confidence, samples, source, at FROM footprints "
    "ORDER BY model, signature"
)
_INSERT = "INSERT INTO footprints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_SEAL = "SELECT changes, digest FROM seal"

_ELSEWHERE = (
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
)
"""Errors that say nothing about the file's content."""

Change = Callable[[dict[tuple[str, str], Footprint]], None]
"""Changes the footprints, by model and signature."""


class StoreFailed(Exception):
    """Footprints can't be kept now; the text says why."""


class FootprintStore:
    """The two files. Calls may come from any task; they are carried out one after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = Database(folder / NAME, _TABLES, (_ROWS, _SEAL))
        self._backup = folder / BACKUP

    async def open(self) -> list[Footprint]:
        """Opens, checks and repairs; returns what there is. StoreFailed when it can't be used: later changes
        try again."""
        return await self._database.do(self._guarded, lambda: list(self._open().values()))

    async def load(self) -> list[Footprint]:
        """As `open`; without a store that can be used, none: it is said and counted, and no reason to
        stop."""
        try:
            return await self.open()
        except StoreFailed:
            return []

    async def put(self, footprints: Iterable[Footprint]) -> list[Footprint]:
        """Keeps them, in place of those with the same key; returns all. StoreFailed: they may be lost."""
        items = {item.key: item for item in footprints}
        return await self._change(lambda kept: kept.update(items))

    async def remove(self, keys: Iterable[tuple[str, str]]) -> list[Footprint]:
        """Forgets them; returns what is left. StoreFailed: they may come back."""
        gone = set(keys)

        def forget(kept: dict[tuple[str, str], Footprint]) -> None:
            for key in gone:
                kept.pop(key, None)

        return await self._change(forget)

    async def close(self) -> None:
        """Closes it."""
        await self._database.shut()

    async def _change(self, change: Change) -> list[Footprint]:
        return await self._database.do(self._guarded, lambda: self._changed(change))

    # In the thread

    def _guarded(self, work: Callable[[], list[Footprint]]) -> list[Footprint]:
        """What the disk refuses is said and counted, and is no fault of ours."""
        try:
            return work()
        except (sqlite3.Error, OSError) as error:
            self._database.close()  # the next call opens anew, and repairs what there is to repair
            metrics.FOOTPRINT_STORE_FAILURES.inc()
            log.error("footprints.unusable", file=NAME, error=str(error))
            words = error.strerror if isinstance(error, OSError) else str(error)
            raise StoreFailed(f"{NAME} in lifecycle.data_dir can't be used: {words}") from error

    def _open(self) -> dict[tuple[str, str], Footprint]:
        """1. the file is right, and as new as its copy; 2. it isn't: put aside, and the copy in its place;
        3. neither is right: a new one is begun. The copy is made anew in the end, unless it is as new."""
        copied, old = self._read_copy()
        try:
            self._database.open()
            kept, changes = _read(self._database.connection)
            if changes < copied:
                raise sqlite3.DatabaseError(f"it has {changes} changes, its copy {copied}")
        except sqlite3.DatabaseError as error:
            if not _damaged(error, self._database.path):
                raise
            self._repair(str(error), old)
            self._database.open()
            kept, changes = _read(self._database.connection)  # 2, 3
        if changes != copied:
            self._copy()
        return kept

    def _read_copy(self) -> tuple[int, bool]:
        """The changes that the copy has seen (-1 = none can be read), and whether it can be used."""
        if not self._backup.exists():
            return -1, False
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{self._backup}?mode=ro&immutable=1", uri=True)
            ) as copy:
                if [row[0] for row in copy.execute("PRAGMA quick_check(1)")] != ["ok"]:
                    raise sqlite3.DatabaseError("its structure is damaged")
                return _read(copy)[1], True
        except sqlite3.DatabaseError as error:
            if not _damaged(error, self._backup):
                raise
            kept_as = put_aside(self._backup)
            log.error("footprints.copy_damaged", file=BACKUP, error=str(error), kept_as=kept_as)
            return -1, False

    def _repair(self, why: str, copy: bool) -> None:
        self._database.close()
        metrics.FOOTPRINT_STORE_REPAIRS.inc()
        kept_as = put_aside(self._database.path)
        log.error("footprints.damaged", file=NAME, error=why, kept_as=kept_as, restored=copy)
        for suffix in JOURNALS:  # one left alone would be taken for the restored file's
            self._database.path.with_name(NAME + suffix).unlink(missing_ok=True)
        if copy:
            new = self._folder / _NEW
            new.write_bytes(self._backup.read_bytes())
            sync(new)
            os.replace(new, self._database.path)
        sync(self._folder)

    def _changed(self, change: Change) -> list[Footprint]:
        if not self._database.opened:
            self._open()
        connection = self._database.connection
        kept, changes = _read(connection)
        change(kept)
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("DELETE FROM footprints")
            rows = [_row(item) for _, item in sorted(kept.items())]
            connection.executemany(_INSERT, rows)
            seal = (changes + 1, _digest(changes + 1, rows))
            connection.execute("INSERT OR REPLACE INTO seal VALUES (1, ?, ?)", seal)
        self._copy()
        return list(kept.values())

    def _copy(self) -> None:
        new = self._folder / _NEW
        new.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(new)) as copy:
            copy.execute("PRAGMA journal_mode = OFF")  # nothing counts before it has its name
            self._database.connection.backup(copy)
        sync(new)
        os.replace(new, self._backup)
        sync(self._folder)


def _damaged(error: sqlite3.DatabaseError, path: Path) -> bool:
    """It is the file's own fault; not that of a disk that is full, a folder that is read-only, or the
    like."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code == sqlite3.SQLITE_READONLY:  # so is a file whose header asks for a newer release
        return any(version not in (1, 2) for version in path.read_bytes()[18:20])
    return code not in _ELSEWHERE


def _row(item: Footprint) -> tuple[object, ...]:
    return (
        item.model,
        item.signature,
        item.kind,
        item.count,
        item.mib,
        item.reserve_mib,
        float(item.confidence),
        item.samples,
        item.source,
        float(item.at),
    )


def _read(connection: sqlite3.Connection) -> tuple[dict[tuple[str, str], Footprint], int]:
    """The footprints and the number of changes. DatabaseError when they don't match their seal."""
    rows = connection.execute(_ROWS).fetchall()
    seal = connection.execute(_SEAL).fetchall()
    changes, digest = seal[0] if len(seal) == 1 else (0, _digest(0, []))
    if digest != _digest(changes, rows):
        raise sqlite3.DatabaseError("its content doesn't match its seal")
    found = [Footprint(*row) for row in rows]
    return {item.key: item for item in found}, changes


def _digest(changes: int, rows: Iterable[Iterable[object]]) -> str:
    text = json.dumps([changes, [list(row) for row in rows]])
    return sha256(text.encode()).hexdigest()
