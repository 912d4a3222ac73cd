"""One file, from an address to its place on disk: resumed, checked, and stopped when nobody wants it.

The library's own download begins anew each time (its partial file is its process' own) and checks no hash;
so large files come this way, from the hub and from any other address alike. What is downloaded lies in a
partial file beside its place: a kill at any instant costs nothing but a hash over what is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import structlog

from tidegate_lifecycle.hub import words
from tidegate_lifecycle.hub.words import HubFailed, Unreachable, Unwritable

log = structlog.get_logger("tidegate.hub")

SILENCE = 20.0
"""Seconds without a byte after which a connection counts as lost."""
PAUSES = (0.5, 2.0, 5.0, 15.0)
"""Seconds before the next try, by the tries in a row that brought nothing; then it has failed."""
PIECE = 40 << 30
"""Bytes asked for at once: what lies behind the hub serves no more than 50 GB in one answer."""
_CHUNK = 1 << 20
_TROUBLE = frozenset({408, 425, 429, 500, 502, 503, 504})
_KEPT = "what came so far is kept, and the next start goes on from there"
_CHECK = "check the model's source, and HF_TOKEN if it is private"


class Stopped(Exception):
    """Nobody wants the file any more. What came so far is kept."""


class Damaged(HubFailed):
    """What came isn't what was announced; it was thrown away."""


@dataclass(frozen=True)
class Job:
    """What is to be where."""

    what: str
    """For people: the file, without its address."""
    url: str
    target: Path
    headers: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    """Bytes; None = unknown."""
    sha256: str = ""
    """Of the content; empty = unknown."""
    validator: str = ""
    """A strong ETag: parts of different contents are never joined. Empty = the target's name says it."""

    same: bool = True
    """What an earlier run has left is of the same content; else it begins anew."""

    @property
    def partial(self) -> Path:
        """Where it grows."""
        tag = hashlib.sha256(self.validator.encode()).hexdigest()[:12] if self.validator else "tidegate"
        return self.target.with_name(f"{self.target.name}.{tag}.incomplete")


class Transfer:
    """One run of a job. `run` blocks, in a thread; the rest may be used from any thread."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.done = 0
        """Bytes that are there."""
        self.total = job.size
        self._came = 0
        self._socket: socket.socket | None = None
        self._digest = hashlib.sha256()
        self._stop = threading.Event()

    def stop(self) -> None:
        """It ends at once; while it connects, within `SILENCE`."""
        self._stop.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the base's own: of TLS it would drop what the reader uses
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def run(self) -> None:
        """Returns when the file is in its place. HubFailed, or Stopped."""
        job = self.job
        try:
            job.target.parent.mkdir(parents=True, exist_ok=True)
            with self._alone() as file:
                if job.target.exists():  # another process was first
                    os.unlink(job.partial)
                    return
                self._take_up(file)
                self._fill(file)
                self._check(file)
                os.replace(job.partial, job.target)
        except OSError as error:
            raise words.unwritable(error) from error

    @contextlib.contextmanager
    def _alone(self) -> Iterator[IO[bytes]]:
        """The partial file, locked: another process may be at it. Its lock ends with it, however it ends."""
        while True:
            with open(self.job.partial, "a+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._pause(0.2)
                    continue
                if self._is_still(file):
                    yield file
                    return

    def _is_still(self, file: IO[bytes]) -> bool:
        """Whether it bears its name; else the other process has just finished or dropped it."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.job.partial))
        except FileNotFoundError:
            return False

    def _take_up(self, file: IO[bytes]) -> None:
        """What an earlier run has left; and there must be room for the rest."""
        if not self.job.same:
            self._begin_anew(file)
        file.seek(0)
        while chunk := file.read(_CHUNK):
            self._heed()
            self._digest.update(chunk)
            self.done += len(chunk)
        if self.total is None:
            return
        if self.done > self.total:
            self._begin_anew(file)
        missing, free = self.total - self.done, shutil.disk_usage(self.job.target.parent).free
        if missing > free:
            text = f"{self.job.what} needs {_gib(missing)} of disk and the hub's cache has {_gib(free)} free"
            raise Unwritable(f"{text}; make room there (lifecycle.hf_cache)")

    def _begin_anew(self, file: IO[bytes]) -> None:
        file.seek(0)
        file.truncate()
        self.done, self.total, self._digest = 0, self.job.size, hashlib.sha256()

    def _fill(self, file: IO[bytes]) -> None:
        """Asks for what is missing until nothing is; whatever brings something starts the tries anew."""
        import httpx2

        tries = 0
        with httpx2.Client(follow_redirects=True, timeout=httpx2.Timeout(SILENCE)) as client:
            while self.total is None or self.done < self.total:
                self._heed()
                before = self._came
                failure = Unreachable(f"{self.job.what} can't be downloaded: the connection breaks; {_KEPT}")
                try:
                    if self._answer(client, file):
                        return
                except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                    log.info("download.cut", file=self.job.what, done=self.done, error=type(error).__name__)
                except Unreachable as error:
                    failure = error
                if self._came > before:
                    tries = 0
                    continue
                if tries >= len(PAUSES):
                    raise failure
                self._pause(PAUSES[tries])
                tries += 1

    def _answer(self, client: Any, file: IO[bytes]) -> bool:
        """One answer, as far as it goes; True when it was the whole of a file of unknown size."""
        headers = {**self.job.headers, "Accept-Encoding": "identity"}
        far = self.total is not None and self.total - self.done > PIECE
        if self.done or far:
            headers["Range"] = f"bytes={self.done}-{self.done + PIECE - 1 if far else ''}"
            if self.job.validator:
                headers["If-Range"] = self.job.validator
        with client.stream("GET", self.job.url, headers=headers) as response:
            self._socket = response.extensions["network_stream"].get_extra_info("socket")
            self._heed()
            status = response.status_code
            goes_on = status == 206 and f" {self.done}-" in response.headers.get("Content-Range", "")
            if status in _TROUBLE:
                raise Unreachable(
                    f"{self.job.what} can't be downloaded: its server answers {status}; {_KEPT}"
                )
            if status not in (200, 206, 416):
                raise HubFailed(f"{self.job.what} can't be downloaded: its server answers {status}; {_CHECK}")
            if self.done and not goes_on:
                self._begin_anew(file)
            if status == 416 or (status == 206 and not goes_on):
                return False
            length = response.headers.get("Content-Length", "")
            if self.total is None and length.isdecimal():
                self.total = self.done + int(length)
            for chunk in response.iter_raw():
                self._heed()
                file.write(chunk)
                self._digest.update(chunk)
                self.done += len(chunk)
                self._came += len(chunk)
        return self.total is None

    def _check(self, file: IO[bytes]) -> None:
        """All of it is on the disk, and it is what was announced; else it goes."""
        file.flush()
        os.fsync(file.fileno())
        if self.total is not None and self.done != self.total:
            wrong = f"has {self.done} bytes instead of {self.total}"
        elif self.job.sha256 and self._digest.hexdigest() != self.job.sha256:
            wrong = "has another SHA-256"
        else:
            return
        os.unlink(self.job.partial)
        text = f"what came as {self.job.what} isn't what was announced (it {wrong})"
        raise Damaged(f"{text}: it was thrown away and is downloaded anew at the next start")

    def _heed(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)
        self._heed()


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
