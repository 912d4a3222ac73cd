"""An event loop for tests: its ready callbacks run in a seeded, shuffled order, and its time is virtual.

What asyncio promises is kept: a timer never fires before its time, each callback runs once, a task has one
step at a time. What only happens to be so isn't: which of several ready tasks runs next, which of two timers
of the same time fires first, that a timer fires on time. Time passes only when nothing is ready, so a minute
of heartbeats costs no minute. There is no real I/O: connections are made in memory (`wires.py`, `memory.py`),
and what would run in a thread runs at once.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

LATEST = 0.02
"""Seconds by which a timer may fire late, now and then: the loop was busy."""


class ShuffleLoop(asyncio.BaseEventLoop):
    """See the module. `seed` None = the order of asyncio itself, and timers on time."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self._ready: deque[asyncio.Handle]
        self._scheduled: list[Any]
        self.dice = random.Random(seed)
        self.shuffles = seed is not None
        self.steps = 0
        """Callbacks that have run."""
        self.errors: list[dict[str, Any]] = []
        """What nobody caught: an exception of a callback, or of a task that nobody asked."""
        self.after_each: Callable[[], None] | None = None
        """Called after each callback: a place for invariants."""
        self.transports: Any = None
        """Makes connections: a `memory.Wires`."""
        self._now = 1000.0
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def _run_once(self) -> None:
        if not self._ready:
            self._pass_time()
        handle = self._next()
        if handle.cancelled():
            return
        self.steps += 1
        handle._run()
        if self.after_each is not None:
            self.after_each()

    def _next(self) -> asyncio.Handle:
        ready = self._ready
        if self.shuffles and len(ready) > 1:
            ready.rotate(-self.dice.randrange(len(ready)))
        return ready.popleft()

    def _pass_time(self) -> None:
        timers = self._scheduled
        while timers and timers[0].cancelled():
            self._drop(heapq.heappop(timers))
        if not timers:
            raise RuntimeError("nothing is ready and no timer is set: this would wait for ever")
        self._now = max(self._now, timers[0].when())
        if self.shuffles and self.dice.random() < 0.1:
            self._now += self.dice.random() * LATEST
        while timers and timers[0].when() <= self._now:
            timer = heapq.heappop(timers)
            self._drop(timer)
            self._ready.append(timer)

    def _drop(self, timer: Any) -> None:
        timer._scheduled = False
        if timer.cancelled():
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined]  # BaseEventLoop's

    # --- what touches the world outside ------------------------------------------------------------------

    def _process_events(self, event_list: Any) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """There is no selector to be woken."""

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Runs it at once, and tells in a later turn."""
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = func(*args)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.call_soon(work)
        return future

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any
    ) -> Any:
        """A connection in memory."""
        return await self.transports.connect(protocol_factory, host, port)

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:
        """A listener in memory."""
        return self.transports.listen(protocol_factory, host, port)

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        """Addresses are as they are."""
        return [(None, None, None, "", (host, port))]


def run(loop: ShuffleLoop, main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` to its end, and everything that it left; the loop is closed afterwards.

    Garbage is collected only at the end: a collection in the middle would end generators in another order.
    """
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(main)
    finally:
        gc.enable()
