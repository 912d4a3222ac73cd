"""The pretended engine: who runs, who waits, and whether it sleeps."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tidegate_simulator.errors import Refusal
from tidegate_simulator.histogram import Histogram
from tidegate_simulator.options import Options

TAGS = frozenset({"weights", "kv_cache"})
"""What a sleeper may be woken in parts of."""


class Work:
    """One request inside the engine. Its id is itself: a count of works is the size of a set of them."""

    __slots__ = ("_pause", "aborted", "arrived", "produced", "prompt_tokens", "reason", "started")

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.produced = 0
        """Tokens generated so far."""
        self.arrived = time.monotonic()
        self.started = 0.0
        """Monotonic seconds when it began to run; 0 while it waits."""
        self.reason = "abort"
        """Its finish_reason; `abort` until it ends well."""
        self.aborted = False
        """The engine dropped it: it ends with what it has."""
        self._pause: asyncio.Future[None] | None = None

    def abort(self) -> None:
        """Ends it at once, in the middle of a pause too."""
        self.aborted = True
        if self._pause is not None:
            _settle(self._pause)

    async def pause(self, seconds: float) -> None:
        """Waits that long, or until aborted, or until the caller's task is cancelled."""
        if self.aborted or seconds <= 0:
            return
        loop = asyncio.get_running_loop()
        self._pause = pause = loop.create_future()
        timer = loop.call_later(seconds, _settle, pause)
        try:
            await pause
        finally:
            timer.cancel()
            self._pause = None


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Engine:
    """Slots for max_num_seqs works, in order of arrival, and the state of sleep."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.running: set[Work] = set()
        self.waiting: dict[Work, asyncio.Future[None]] = {}
        self.level = 0
        """0 awake, 1 weights offloaded, 2 weights discarded."""
        self.asleep_tags: frozenset[str] = frozenset()
        """What of it sleeps."""
        self.weights_valid = True
        """False after level 2 until the weights are loaded again: the answers are gibberish."""
        self._free = asyncio.Event()
        self._free.set()
        self._frozen = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.stopping = False
        """No new work is taken."""
        self.totals: Counter[str] = Counter()
        """For /metrics: prompt_tokens, generation_tokens, preemptions, rejections, success:REASON."""
        self.first_token = Histogram()
        self.whole = Histogram()
        self.queued = Histogram()

    def __repr__(self) -> str:
        return f"Engine(running={len(self.running)}, waiting={len(self.waiting)}, level={self.level})"

    @property
    def sleeping(self) -> bool:
        """Whether any part of it sleeps."""
        return bool(self.asleep_tags)

    @property
    def kv_usage(self) -> float:
        """Fraction of the KV cache in use, 0 to 1."""
        held = sum(work.prompt_tokens + work.produced for work in self.running)
        return min(1.0, held / self._options.kv_tokens)

    @asynccontextmanager
    async def slot(self, work: Work) -> AsyncIterator[None]:
        """Runs the block inside the engine; before that it waits for its turn, and while the engine sleeps.

        Raises Refusal where as many wait as may, or while the server shuts down.
        """
        await self._enter(work)
        work.started = time.monotonic()
        self.queued.observe(work.started - work.arrived)
        try:
            yield
        finally:
            self._leave(work)
            self._count(work)

    async def thawed(self) -> None:
        """Returns once no sleep holds running works back."""
        if self._frozen:
            await self._free.wait()

    def abort_all(self) -> None:
        """Drops everything that runs or waits."""
        for work in [*self.running, *self.waiting]:
            work.abort()
        for granted in self.waiting.values():
            _settle(granted)

    async def sleep(self, level: int, mode: str) -> None:
        """Puts it to sleep. Mode `abort` ends what it does, `wait` lets that end first, `keep` freezes it.

        Level 0 only holds new works back.
        """
        self._free.clear()
        self._frozen = mode == "keep"
        if mode == "abort":
            self.abort_all()
        if mode != "keep":
            await self._idle.wait()
        await asyncio.sleep(self._options.sleep_time)
        if level > 0:
            self.level, self.asleep_tags = level, TAGS
            self.weights_valid = self.weights_valid and level < 2

    async def wake(self, tags: frozenset[str]) -> None:
        """Wakes those parts; works go on once all are awake."""
        await asyncio.sleep(self._options.wake_time)
        self.asleep_tags -= tags
        if not self.asleep_tags:
            self.level = 0
            self._frozen = False
            self._free.set()
            self._fill()

    async def drained(self, seconds: float) -> None:
        """Returns once nothing runs or waits, or after that time."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    async def _enter(self, work: Work) -> None:
        if self.stopping:
            raise Refusal(503, "The server is shutting down")
        if not self.waiting and self._has_room():
            self._run(work)
            return
        limit = self._options.max_num_queued_reqs
        if limit is not None and len(self.waiting) >= limit:
            self.totals["rejections"] += 1
            raise Refusal(503, f"The engine's queue is full: {limit} requests are waiting")
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting[work] = granted
        try:
            await granted
        except asyncio.CancelledError:
            # The slot may have been granted in the same turn as the cancellation: it goes back.
            self._leave(work)
            raise
        finally:
            self.waiting.pop(work, None)

    def _count(self, work: Work) -> None:
        self.totals["prompt_tokens"] += work.prompt_tokens
        self.totals["generation_tokens"] += work.produced
        self.totals[f"success:{work.reason}"] += 1
        self.whole.observe(time.monotonic() - work.arrived)

    def _leave(self, work: Work) -> None:
        self.running.discard(work)
        self._fill()
        if not self.running:
            self._idle.set()

    def _fill(self) -> None:
        for work, granted in list(self.waiting.items()):
            if not self._has_room():
                return
            if not granted.done():
                del self.waiting[work]
                self._run(work)
                granted.set_result(None)

    def _run(self, work: Work) -> None:
        self.running.add(work)
        self._idle.clear()

    def _has_room(self) -> bool:
        return self._free.is_set() and len(self.running) < self._options.max_num_seqs
