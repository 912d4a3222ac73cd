"""A fault at every await and at every log call of the ways of a request through edge and admission.

For each way, each kind of task and each error: at the first wait, at the second, and so on until the way ends
without it. After each one all is as before: no ticket, lease, slot, body, connection, relay or task is left
over, admission's books agree after every step, and the next request is served.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from tests.edge.fakes import ModelServer
from tests.proof.paths import PATHS, Request, script
from tests.proof.world import HANDLERS, TTL, World, world
from tests.support.faults import LATER, NOW, Fault, Injector
from tests.support.shuffle import ShuffleLoop, run
from tidegate_chassis import logs

MOST = 500
"""Waits that a way may have, at most: it must end."""
SHELLS = (
    "App.__call__", "Waiting._comment",  # a request
    "Session._keep_streams", "Session._write",  # the edge's session
    "Server._serve", "Stream._read",  # admission's streams: writers (and unary calls), readers
    "log",
)  # fmt: skip
"""A fault there costs one request or one stream."""
PARTS = (
    "Session.run", "Session._watch", "Catalog.run",  # the edge
    "Link.run", "Link._send", "Timer.run",  # admission
    "bare log",
    *HANDLERS,  # admission's core
)  # fmt: skip
"""A fault there may end the process, which is started again and rebuilds its books."""
ERRORS = (asyncio.CancelledError, OSError, MemoryError)


class Trials:
    """One way, walked again and again in one world, each time with a later fault."""

    def __init__(self, w: World, injector: Injector, name: str) -> None:
        self.w, self.injector, self.name = w, injector, name
        self.before: Counter[str] = Counter()
        """Tasks before the first fault, by the name of their coroutine."""

    async def all(self, target: str, error: type[BaseException], when: str) -> int:
        """Faults at the first wait, the second, ... of `target`; how many there were."""
        assert await Request(self.w).over() == 200
        await asyncio.sleep(0.5)
        self.before = _tasks()
        for k in range(1, MOST):
            fault = Fault(target, error, k, when)
            try:
                await self.one(fault)
            except BaseException as failure:
                words = f"{self.name}: {error.__name__} at wait or call {k} of {target}, {when}: {failure!r}"
                raise AssertionError(words) from failure
            if not fault.reached:
                return k - 1
        raise AssertionError("the way has no end")

    async def one(self, fault: Fault) -> None:
        """Walks the way with one fault; what it leaves."""
        w = self.w
        w.deaths.clear()
        self.injector.arm(fault)
        async with asyncio.timeout(20.0):
            await PATHS[self.name](w)
        self.injector.armed = None
        async with asyncio.timeout(60.0):
            await self.settled()
            if await Request(w).over() != 200:
                assert fault.when == LATER, "the next request"  # that one met the fault, as its task went on
                await self.settled()
                assert await Request(w).over() == 200, "the next request but one"
            await self.settled()
        assert fault.target in PARTS or not w.deaths, f"a process ended: {w.deaths}"
        assert w.deaths or not (fault.reached and fault.target in HANDLERS), (
            "an error out of the core is fatal"
        )

    async def settled(self) -> None:
        """Waits until all is as it was before the first fault."""
        w = self.w
        await w.until(lambda: w.app is not None and not w.edge.ready(), "the edge is ready")
        await w.settled(2 * TTL + 1.0)
        await w.until(lambda: len(w.dispatcher.sessions) <= 2, "the sessions of dead edges go")
        assert len(w.edge.relays) == w.edge.spools.memory.total == 0
        assert not [one for one in w.edge.upstream._open if one._reply is not None], "a busy connection"
        await w.until(lambda: _tasks() == self.before, f"the same tasks run as before: {self.before}")


def _tasks() -> Counter[str]:
    """What runs, by name; a model server's connections are kept for a while."""
    found = Counter(str(getattr(task.get_coro(), "target", "")) for task in asyncio.all_tasks())
    del found["ModelServer._serve"]
    return found


async def _walk(name: str, target: str, error: type[BaseException], when: str) -> int:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ShuffleLoop)
    injector = Injector(loop)
    async with world() as w, ModelServer(script).running() as server:
        w.on_call = injector.called
        _log_through(injector, target)
        await w.start(i1=server.url)
        await w.start_edge(keepalive_after=0.1)
        loop.after_each = w.check
        count = await Trials(w, injector, name).all(target, error, when)
        loop.after_each = None
        assert not loop.errors, loop.errors
        return count


def _log_through(injector: Injector, target: str) -> None:
    """Log calls are counted and write nothing: `log` as services set it up, `bare log` without its guard."""

    def call(*_: Any) -> Any:
        injector.called(target)
        raise structlog.DropEvent

    wrapper = structlog.make_filtering_bound_logger(0)
    structlog.configure(
        processors=[call] if target in ("log", "bare log") else [_drop],
        wrapper_class=wrapper if target == "bare log" else logs.unfailing(wrapper),
    )


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent


def _cases(targets: tuple[str, ...], slow: bool) -> Iterator[tuple[str, type[BaseException], str]]:
    """Targets, errors and moments. By default a part has one error, and MemoryError is left to `--slow`: it
    goes the same ways as OSError."""
    for target in targets:
        called = target in HANDLERS or target.endswith("log")
        for error, when in itertools.product(ERRORS, (NOW,) if called else (NOW, LATER)):
            usual = error is OSError if called or target in PARTS else error is not MemoryError
            if usual or (slow and not (called and error is asyncio.CancelledError)):
                yield target, error, when


@pytest.mark.parametrize("targets", [SHELLS, PARTS], ids=["shells", "parts"])
@pytest.mark.parametrize("name", PATHS)
def test_a_fault_at_any_wait_leaves_nothing(
    name: str, targets: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """All is given back, the next request is served, and no process ends but for a fault in its own parts."""
    faults = 0
    for target, error, when in _cases(targets, request.config.getoption("--slow")):
        faults += run(ShuffleLoop(), _walk(name, target, error, when))
    assert faults > 0, "a way without a single wait"
