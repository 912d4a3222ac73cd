"""The master of several workers: binds the port, keeps the processes, adds up what they tell.

It serves no request. A worker that dies is replaced; one that is to be renewed retires when its successor
takes connections. When the master is gone, however, the workers see the end of their links and stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from tidegate_chassis import telemetry
from tidegate_chassis.config import EXIT_CONFIG, ConfigError
from tidegate_chassis.process import monotonic
from tidegate_edge.downstream.accept import Board
from tidegate_edge.downstream.server import bind, url_of
from tidegate_edge.settings import Loaded, load
from tidegate_edge.workers.figures import Figures
from tidegate_edge.workers.link import Link, Message
from tidegate_edge.workers.peers import Post
from tidegate_edge.workers.process import Worker

log = structlog.get_logger("tidegate.edge")

_LISTEN = 60.0
"""Seconds that a successor has until it takes connections."""
_END = 7.5
"""Seconds from the word to stop until what is left is killed; a worker itself takes 7 at most."""
_UNHEARD = 10.0
"""Seconds that a process may live without its link."""
_FIXED = ("listen", "workers", "metrics_listen")
"""Keys that a renewal doesn't change: they are the master's."""


@dataclass(eq=False)
class Place:
    """One of the workers, over all its processes."""

    number: int
    retired: Worker | None = None
    """The process before the present one, as long as it lives."""
    renewal: asyncio.Future[bool] | None = None
    """Somebody waits for another process here; the result: whether there is one."""
    wanted: asyncio.Event = field(default_factory=asyncio.Event)


class Master:
    """Runs until its stop event is set, then until all workers have ended."""

    def __init__(self, config: Path, loaded: Loaded) -> None:
        self._config = config
        self._settings = loaded.edge
        self._secure = loaded.https is not None
        self._places = [Place(number) for number in range(1, loaded.edge.workers + 1)]
        self._alive: set[Worker] = set()
        self._cells = set(range(2 * len(self._places)))
        """Of the board, those that no process has."""
        self._figures = Figures(self._alive)
        self._queue: list[Place] = []
        """To be renewed, one after the other."""
        self._queued = asyncio.Event()
        self._greeted = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop: asyncio.Event
        self._listening: socket.socket
        self._board: Board

    async def run(self, stop: asyncio.Event, hangup: asyncio.Event) -> None:
        """Serves until `stop`; `hangup` renews all workers. ConfigError when the workers refuse the file."""
        self._stop = stop
        self._listening = await asyncio.to_thread(bind, self._settings.listen)
        self._board = Board(2 * len(self._places))
        keepers = [asyncio.create_task(self._keep(place)) for place in self._places]
        others = [self._renew_in_turn(), self._renew_on(hangup), self._figures.look()]
        tasks = [*keepers, *(asyncio.create_task(other) for other in others)]
        try:
            registry, port = self._figures.registry(), self._settings.metrics_listen
            await asyncio.to_thread(telemetry.serve_metrics, port, registry)
            stopped = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            for task in done:
                task.result()
        finally:
            stop.set()
            for task in tasks[len(keepers) :]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end_all()

    # One place.

    async def _keep(self, place: Place) -> None:
        """A process for a place, and again whenever it has ended, sooner after the first death than after the
        fifth. Raises ConfigError when a worker refuses the configuration before any has come up."""
        deaths = 0
        while not self._stop.is_set():
            began = monotonic()
            worker = await self._spawn(place)
            if worker is not None:
                worker = await self._attend(place, worker)
                began = worker.started
            if self._stop.is_set():
                return
            deaths = 1 if monotonic() - began > 30 else deaths + 1
            delay = min(5.0, 0.1 * 2 ** (deaths - 1))
            if worker is not None:
                self._mourn(worker, delay)
            await _first(self._stop, within=delay)

    def _mourn(self, worker: Worker, delay: float) -> None:
        if worker.process.returncode == EXIT_CONFIG and not self._greeted:
            raise ConfigError([])  # it has told the problems itself
        log.warning(
            "a worker has ended; another one is started",
            worker=worker.number, pid=worker.pid, ending=worker.ending, delay=delay,
        )  # fmt: skip

    async def _attend(self, place: Place, worker: Worker) -> Worker:
        """Waits until the process of a place has ended by itself, whichever it then is."""
        while True:
            await _first(worker.ended, place.wanted, self._stop)
            if worker.ended.is_set() or self._stop.is_set():
                return worker
            place.wanted.clear()
            renewal, place.renewal = place.renewal, None
            successor = await self._succeed(place, worker)
            if renewal is not None and not renewal.done():
                renewal.set_result(successor is not worker)
            worker = successor

    async def _succeed(self, place: Place, worker: Worker) -> Worker:
        """Puts another process in a worker's place; gives the one that is there then.

        1. The one before it must be gone: a place has two processes at most. 2. The new one takes
        connections, 3. and the old one retires. 4. When the new one doesn't come up the old one stays.
        """
        if place.retired is not None:  # 1
            await _first(place.retired.ended, self._stop)
            if self._stop.is_set():
                return worker
        fresh = await self._spawn(place)
        if fresh is None:
            return worker
        await _first(fresh.listening, fresh.ended, self._stop, within=_LISTEN)  # 2
        if fresh.listening.is_set():
            worker.retiring = True  # 3
            worker.link.say(do="retire")
            place.retired = worker
            log.info("a worker is renewed", worker=place.number, pid=fresh.pid, old=worker.pid)
            return fresh
        if not self._stop.is_set():
            log.error("a new worker didn't come up; the old one stays", worker=place.number)
            fresh.kill()  # 4
        return worker

    async def _spawn(self, place: Place) -> Worker | None:
        """A new process; None when the system has none to give."""
        cell = self._cells.pop()
        try:
            process, link = await self._start(place.number, cell)
        except OSError as error:
            self._cells.add(cell)
            log.error("a worker can't be started", worker=place.number, error=error.strerror)
            return None
        worker = Worker(place.number, cell, process, link, monotonic())
        self._alive.add(worker)
        self._run(self._follow(worker, place))
        return worker

    async def _start(self, number: int, cell: int) -> tuple[asyncio.subprocess.Process, Link]:
        """A process, which has its link, the listening socket and the board before it begins."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, contextlib.ExitStack() as stack:
            stack.callback(ours.close)
            Post(number, len(self._places), cell, theirs, self._listening, self._board).offer(ours)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tidegate_edge", "--config", str(self._config),
                "--worker", f"{number}:{theirs.fileno()}",
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is for the master, which stops them in order
            )  # fmt: skip
            stack.pop_all()
        return process, await Link.over(ours)

    async def _follow(self, worker: Worker, place: Place) -> None:
        """A worker's words, and its end."""
        await worker.link.hear(lambda message: self._take(worker, place, message))
        worker.link.close()
        try:
            await asyncio.wait_for(worker.process.wait(), _UNHEARD)
        except TimeoutError:
            worker.kill()
            await worker.process.wait()
        self._alive.discard(worker)
        self._board.clear(worker.cell)
        self._cells.add(worker.cell)
        self._figures.forget(worker)
        if worker.retiring:
            log.info("a worker has retired", worker=worker.number, pid=worker.pid, ending=worker.ending)
        if place.retired is worker:
            place.retired = None
        worker.ended.set()

    def _take(self, worker: Worker, place: Place, message: Message) -> None:
        kind = message.get("do")
        if kind == "listening":
            worker.listening.set()
            self._greet()
        elif kind == "renew":
            log.info("a worker asks to be renewed", worker=worker.number, pid=worker.pid)
            self._want([place])
        elif kind == "last":
            worker.families, worker.last = message["families"], True
        elif "ask" in message:
            self._run(self._answer(worker, str(message["ask"]), message["number"]))

    def _greet(self) -> None:
        """Says once that all take connections."""
        up = {worker.number for worker in self._alive if worker.listening.is_set()}
        if not self._greeted and len(up) == len(self._places):
            self._greeted = True
            line = f"listening on {url_of(self._listening, self._secure)}"
            log.info(line, workers=len(up))

    # Renewal.

    async def _renew_on(self, hangup: asyncio.Event) -> None:
        """All workers, unless the file that they would read is refused."""
        while True:
            await hangup.wait()
            hangup.clear()
            try:
                loaded = await asyncio.to_thread(load, self._config)
            except ConfigError as error:
                log.error(
                    "the configuration is refused; no worker is renewed",
                    problems=[str(problem) for problem in error.problems],
                )
                continue
            kept = [key for key in _FIXED if getattr(loaded.edge, key) != getattr(self._settings, key)]
            if kept:
                log.warning("these keys of edge count after a stop and a start", keys=kept)
            log.info("renewing all workers")
            self._want(self._places)

    def _want(self, places: Iterable[Place]) -> None:
        self._queue += [place for place in places if place not in self._queue]
        self._queued.set()

    async def _renew_in_turn(self) -> None:
        """One after the other; when one doesn't come up, the others stay as they are."""
        while True:
            await self._queued.wait()
            self._queued.clear()
            while self._queue:
                place = self._queue.pop(0)
                renewal = place.renewal = asyncio.get_running_loop().create_future()
                place.wanted.set()
                if not await renewal:
                    self._queue.clear()

    async def _answer(self, asker: Worker, what: str, number: int) -> None:
        answer = await (self._figures.text() if what == "metrics" else self._figures.told())
        asker.link.say(answer=answer, number=number)

    # The end.

    async def _end_all(self) -> None:
        """The port is closed here first: it is closed for good when the last worker lets go of it."""
        self._listening.close()
        for worker in self._alive:
            worker.link.say(do="stop")
        ends = [asyncio.create_task(worker.ended.wait()) for worker in self._alive]
        if ends:
            _, late = await asyncio.wait(ends, timeout=_END)
            if late:
                log.warning("workers are killed that didn't stop", workers=len(late))
            for worker in list(self._alive):
                worker.kill()
            await asyncio.gather(*ends)

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _first(*events: asyncio.Event, within: float | None = None) -> None:
    """Waits until one of the events is set, or `within` seconds."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
