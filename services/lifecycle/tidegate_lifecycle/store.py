"""What lifecycle remembers: its boot counter, admission's roster, and how long loads took.

One SQLite file in the data directory (WAL, every commit synced), used by one thread. The directory is locked:
two lifecycle services on one directory would stop each other's servers.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import structlog

from tidegate_chassis.config import ConfigError, Problem
from tidegate_lifecycle.database import Database, put_aside

log = structlog.get_logger("tidegate.store")

NAME = "lifecycle.db"
ALPHA = 0.3
"""Weight of the newest load in a model's mean load time."""
_TABLES = """
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS roster (id INTEGER PRIMARY KEY CHECK (id = 1), sessions TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS taken (device TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS loads (model TEXT PRIMARY KEY, seconds REAL NOT NULL, count INTEGER NOT NULL);
"""
_QUERIES = (
    "SELECT value FROM counters",
    "SELECT sessions FROM roster",
    "SELECT seconds, count FROM loads",
    "SELECT device FROM taken",
)


class Store:
    """The file and its lock. Calls may come from any task; they are carried out one after the other."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self.database = Database(data_dir / NAME, _TABLES, _QUERIES)
        self._do = self.database.do
        self._lock: int | None = None

    async def lock(self) -> None:
        """Makes and takes the directory. ConfigError when it can't be written, or another service has it."""
        await self._do(self._take)

    async def open(self) -> int:
        """Opens the file, after `lock`; returns the number of this boot, higher than all before.

        A damaged file is put aside, and a new one begun: what it held can be learned again. Only the boot
        counter must not go back, so it goes on from the clock's seconds, which no counter has reached.
        """
        return await self._do(self._open)

    async def roster(self) -> list[str] | None:
        """The sessions that the last admission named; None = unknown, since what there was is lost."""
        return await self._do(self._roster)

    async def set_roster(self, roster: Sequence[str]) -> None:
        """Remembers them."""
        await self._do(self._set_roster, list(roster))

    async def no_admission(self) -> bool:
        """No admission has ever connected. False when that isn't known."""
        return await self._do(self._no_admission)

    async def set_admission(self) -> None:
        """Remembers that one has."""
        await self._do(self._write, "DELETE FROM counters WHERE name = 'no_admission'", ())

    async def load_times(self) -> dict[str, float]:
        """Mean load time of each model that was ever loaded, in seconds; new ones weigh more."""
        return await self._do(self._load_times)

    async def record_load(self, model: str, seconds: float) -> float:
        """Takes a load into the mean, and returns it."""
        return await self._do(self._record_load, model, seconds)

    async def taken(self) -> set[str]:
        """The devices that an operator has taken back: UUIDs, or ids of declared ones."""
        return await self._do(self._taken)

    async def set_taken(self, devices: Collection[str]) -> None:
        """Remembers them."""
        await self._do(self._set_taken, sorted(devices))

    async def close(self) -> None:
        """Closes the file and gives the directory free."""
        await self._do(self._give_back)
        await self.database.shut()

    # In the thread

    def _take(self) -> None:
        if self._lock is not None:
            return
        path = self._data_dir / "lock"
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _refused(f"{self._data_dir} can't be written: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            words = f"{self._data_dir} is in use by another lifecycle service (process {holder})"
            raise _refused(f"{words}; stop it, or give this one a data_dir of its own") from error
        except OSError as error:
            os.close(fd)
            raise _refused(f"{self._data_dir} can't be written: {error.strerror}") from error
        self._lock = fd

    def _open(self) -> int:
        self._take()
        try:
            self.database.open()
            damaged = False
        except sqlite3.OperationalError as error:
            raise _refused(f"{self.database.path} can't be used: {error}") from error
        except sqlite3.DatabaseError as error:
            log.error("store.damaged", file=NAME, error=str(error), kept_as=put_aside(self.database.path))
            self.database.open()
            damaged = True
        try:
            return self._begin(self._db, damaged)
        except sqlite3.OperationalError as error:  # a full disk
            raise _refused(f"{self.database.path} can't be written: {error}; make room there") from error

    def _begin(self, connection: sqlite3.Connection, damaged: bool) -> int:
        """Counts this boot."""
        with connection:
            row = connection.execute("SELECT value FROM counters WHERE name = 'boot'").fetchone()
            boot = row[0] + 1 if row else 1
            if damaged or (row is None and any(self._data_dir.glob(f"{NAME}.damaged-*"))):
                boot = int(time.time())
            connection.execute("INSERT OR REPLACE INTO counters VALUES ('boot', ?)", (boot,))
            if boot == 1 and not any(self._data_dir.glob("instances/*")):
                # Nothing was ever started here, so nobody holds a lease: a first boot waits for nobody.
                connection.execute("INSERT OR IGNORE INTO roster VALUES (1, '[]')")
                connection.execute("INSERT OR IGNORE INTO counters VALUES ('no_admission', 1)")
        return boot

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        """A full disk must not end a service whose model servers work; it remembers less, and says so."""
        try:
            with self._db as connection:
                connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            log.error("store.unwritable", file=NAME, error=str(error))

    def _roster(self) -> list[str] | None:
        row = self._db.execute("SELECT sessions FROM roster").fetchone()
        return [str(session) for session in json.loads(row[0])] if row else None

    def _no_admission(self) -> bool:
        return self._db.execute("SELECT 1 FROM counters WHERE name = 'no_admission'").fetchone() is not None

    def _set_roster(self, roster: list[str]) -> None:
        self._write("INSERT OR REPLACE INTO roster VALUES (1, ?)", (json.dumps(roster),))

    def _taken(self) -> set[str]:
        return {row[0] for row in self._db.execute("SELECT device FROM taken")}

    def _set_taken(self, devices: list[str]) -> None:
        text = json.dumps(devices)
        self._write("DELETE FROM taken WHERE device NOT IN (SELECT value FROM json_each(?))", (text,))
        self._write("INSERT OR IGNORE INTO taken SELECT value FROM json_each(?)", (text,))

    def _load_times(self) -> dict[str, float]:
        return dict(self._db.execute("SELECT model, seconds FROM loads").fetchall())

    def _record_load(self, model: str, seconds: float) -> float:
        row = self._db.execute("SELECT seconds, count FROM loads WHERE model = ?", (model,)).fetchone()
        mean, count = (row[0] + ALPHA * (seconds - row[0]), row[1] + 1) if row else (seconds, 1)
        self._write("INSERT OR REPLACE INTO loads VALUES (?, ?, ?)", (model, mean, count))
        return float(mean)

    @property
    def _db(self) -> sqlite3.Connection:
        return self.database.connection

    def _give_back(self) -> None:
        if self._lock is not None:
            self.database.close()
            os.close(self._lock)
            self._lock = None


def _refused(message: str) -> ConfigError:
    return ConfigError([Problem("lifecycle.data_dir", message)])
