"""Calls to the Docker daemon: the SDK's blocking calls in threads of their own, each with a deadline.

A daemon can hang for minutes, and so does every thread that waits for it. So there are few of them, what
waits for one is bounded, and the SDK's own timeout is below each call's deadline: a thread is free again
before long. The threads are daemon threads: a call that hangs doesn't keep this process from ending.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import requests
import urllib3
from docker.api.client import APIClient
from docker.errors import APIError, DockerException
from docker.utils import kwargs_from_env

from tidegate_lifecycle.runtimes.docker import words

_T = TypeVar("_T")

THREADS = 8
"""Calls that run at one time."""
WAITING = 64
"""Calls that may wait for a thread; more fail at once."""
_LOST = (requests.RequestException, urllib3.exceptions.HTTPError, DockerException, OSError)
_SDK_SHARE = 0.8
"""The SDK's own timeout, as a share of a call's deadline."""


@dataclass(frozen=True)
class Patience:
    """Deadlines in seconds, from the order to the answer, a wait for a thread included."""

    look: float = 10.0
    """Inspecting, listing, reading logs."""
    end: float = 20.0
    """Signals and removals."""
    start: float = 60.0
    """Creating and starting: the daemon copies, mounts, and asks the drivers of GPUs."""
    pull: float = 120.0
    """Without a word about a pull; a pull as a whole has no deadline."""


class DockerFailed(Exception):
    """A call that failed. Its text is for callers: no paths, no environment."""


class NoAnswer(DockerFailed):
    """The daemon can't be reached, or gave no answer in time: what it did, or still will, is unknown."""


class Declined(DockerFailed):
    """The daemon answered with an error."""

    def __init__(self, text: str, status: int, said: str) -> None:
        super().__init__(text)
        self.status = status
        """Its HTTP status."""
        self.said = said
        """Its own words: not for callers, they may hold paths."""


class Absent(Declined):
    """There is no such container, image or network (any more)."""


class _Client(APIClient):
    """The SDK gives a pull no timeout at all, not even between two words of it; here it has the client's."""

    def _post(self, url: str, **keywords: Any) -> Any:
        return super()._post(url, **{**keywords, "timeout": self.timeout})  # type: ignore[misc]


class Daemon:
    """The Docker daemon that the environment names (DOCKER_HOST), by default the local one."""

    def __init__(self, patience: Patience | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self.patience = patience or Patience()
        self._environ = dict(environ)
        self._clients: dict[float, APIClient] = {}
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._calls: set[Future[Any]] = set()

    async def call(self, deadline: float, function: Callable[[APIClient], _T]) -> _T:
        """Runs `function` in a thread; DockerFailed with words for callers when it can't be done in time."""
        if len(self._calls) >= THREADS + WAITING:
            raise NoAnswer("too many calls wait for Docker")
        if len(self._threads) < min(THREADS, len(self._calls) + 1):
            self._threads.append(spawn(self._serve, "tidegate-docker"))
        timeout = deadline * _SDK_SHARE
        future: Future[_T] = Future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        self._work.put((future, lambda: function(self._kept(timeout))))
        try:
            async with asyncio.timeout(deadline):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise NoAnswer(f"Docker gave no answer within {deadline:g} s") from None

    def client(self, timeout: float) -> APIClient:
        """A new client. Blocks: called in a thread. It speaks the newest version that both sides know."""
        return _Client(version="auto", timeout=timeout, **kwargs_from_env(environment=self._environ))  # type: ignore[arg-type]

    def close(self) -> None:
        """Closes all connections and lets the threads go. Blocks for a moment: called in a thread."""
        for _ in self._threads:
            self._work.put(None)
        until = time.monotonic() + 1.0
        for thread in self._threads:  # a call under way opens connections anew; a hung one is left
            thread.join(max(0.0, until - time.monotonic()))
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.close()

    def _kept(self, timeout: float) -> APIClient:
        with self._lock:
            client = self._clients.get(timeout)
        if client is not None:
            return client
        made = self.client(timeout)
        with self._lock:
            client = self._clients.setdefault(timeout, made)
        if client is not made:  # another thread was first
            made.close()
        return client

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            future, function = item
            if not future.set_running_or_notify_cancel():
                continue  # its caller has given up
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - whatever it was, its caller gets it
                future.set_exception(translated(error))


def spawn(target: Callable[[], None], name: str) -> threading.Thread:
    """A daemon thread."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def translated(error: Exception) -> Exception:
    """An error of the SDK in our words; any other one as it is, for it is a fault of ours."""
    if type(error) is DockerException and isinstance(error.__cause__, Exception):
        return translated(error.__cause__)  # the SDK's constructor wraps what its first call met
    if isinstance(error, APIError) and error.status_code is not None:
        said = str(error.explanation or error)
        kind = Absent if error.status_code == 404 else Declined
        return kind(words.why(said), error.status_code, said)
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return NoAnswer("Docker gave no answer in time")
    if isinstance(error, _LOST):
        return NoAnswer(words.unreachable(error))
    return error
