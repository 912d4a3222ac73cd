"""A process of the simulated world: an event loop of its own on the world's clock, which can be killed,
frozen and thawed. What runs on it is the services' real code; it can't tell the difference.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.world import World


class VirtualLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as the services use: what else it should have raises NotImplementedError.
    Its time is the world's, from a zero of its own."""

    def __init__(self, process: Process, zero: float) -> None:
        self.process, self._zero = process, zero
        self._ready: deque[asyncio.Handle] = deque()

    def time(self) -> float:
        return self.process.world.now + self._zero

    def call_soon(  # type: ignore[override]  # typed loosely
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]  # typed loosely
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.process.world.at(when - self._zero, functools.partial(self._due, handle))
        return handle

    def call_later(  # type: ignore[override]  # typed loosely
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def _due(self, handle: asyncio.TimerHandle) -> None:
        if not handle.cancelled():
            self.process.post(self._run_timer, handle)

    def _run_timer(self, handle: asyncio.TimerHandle) -> None:
        if not handle.cancelled():  # it may have been while the process was frozen
            handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is skipped when it is due."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.process.alive:
            self.process.failure = context.get("exception") or AssertionError(context.get("message"))

    def drain(self) -> None:
        """Runs what is ready, and what that makes ready."""
        asyncio._set_running_loop(self)
        try:
            while self._ready:
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)


class Process:
    """One process; what it is, its subclasses say in `main`, whose end with an exception is a failure."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.alive, self.frozen = True, False
        self.began = world.now
        self.thawed = world.now
        """When it last came back from a freeze."""
        self.failure: BaseException | None = None
        self.methods: dict[str, Any] = {}
        """What it serves: gRPC handlers by their full names."""
        zero = world.random.uniform(1e3, 1e6)
        self.loop = VirtualLoop(self, zero)  # type: ignore[abstract]  # see the class
        self._backlog: list[Callable[[], object]] = []

    def start(self) -> None:
        """Begins `main`."""
        self.post(self._begin)

    def _begin(self) -> None:
        task = self.loop.create_task(self.main())
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self.alive and not task.cancelled() and (error := task.exception()) is not None:
            self.failure = error

    async def main(self) -> None:
        """Its life."""
        raise NotImplementedError

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose exception is a failure. Called on the process's own loop."""
        task = self.loop.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        """Something happens to it: the callback runs on its loop, at once or when it is thawed."""
        if not self.alive:
            return
        event = functools.partial(callback, *args)
        if self.frozen:
            self._backlog.append(event)
            return
        if asyncio._get_running_loop() is not None:  # said by another process in the middle of a step
            self.world.at(self.world.now, functools.partial(self.post, event))
            return
        self.loop.call_soon(event)
        self.loop.drain()
        self.world.stepped(self)
        if self.failure is not None:
            raise self.failure

    def freeze(self) -> None:
        """SIGSTOP."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT: what came meanwhile is read in its order, mixed with the timers that are overdue."""
        self.frozen, self.thawed = False, self.world.now
        backlog, self._backlog = self._backlog, []
        for callback in backlog:
            self.world.at(self.world.now, functools.partial(self.post, callback))

    def kill(self) -> None:
        """SIGKILL: nothing that its code still does has any effect on the world."""
        self.alive, self.frozen = False, False
        self.world.network.left(self)
        if self.world.network.processes.get(self.name) is self:
            del self.world.network.processes[self.name]
        while tasks := [task for task in asyncio.all_tasks(self.loop) if not task.done()]:
            for task in tasks:
                task.cancel()
            self.loop.drain()
