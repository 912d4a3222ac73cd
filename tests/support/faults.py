"""Faults at the k-th await of chosen tasks, or at the k-th call of a chosen function.

A task factory wraps every coroutine. Each time that a task of the armed kind waits, it is counted, beginning
with those that wait already; the k-th ends by the fault: at once, as if what is awaited had failed, or when
it would have gone on, as if the result had come and something else went wrong first. A CancelledError is a
real `cancel()` of the task.
"""

from __future__ import annotations

import asyncio
import collections.abc
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

NOW, LATER = "instead of waiting", "as it goes on"


@dataclass
class Fault:
    """One fault; `reached` tells whether there were as many waits or calls."""

    target: str
    """Qualified name of the task's coroutine, or of what calls `Injector.called`."""
    error: type[BaseException]
    k: int
    when: str = NOW
    count: int = 0

    @property
    def reached(self) -> bool:
        """It has happened."""
        return self.count >= self.k

    def due(self, target: str) -> bool:
        """Counts a wait or call of `target`; true for the k-th."""
        if target != self.target or self.reached:
            return False
        self.count += 1
        return self.reached


class Injector:
    """Wraps the tasks of a loop. At most one fault is armed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.armed: Fault | None = None
        self._driven: weakref.WeakKeyDictionary[_Driven, None] = weakref.WeakKeyDictionary()
        loop.set_task_factory(self._make)

    def arm(self, fault: Fault) -> None:
        """From now on waits and calls are counted; a task that waits now may be the first to be hit."""
        self.armed = fault
        for driven in list(self._driven):
            if driven.awaited and not driven.task.done() and fault.due(driven.target):
                driven.hit(fault)

    def called(self, target: str) -> None:
        """A counted function is called; raises its fault."""
        if self.armed is not None and self.armed.due(target):
            raise self.armed.error("injected")

    def _make(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        driven = _Driven(coro, self)
        self._driven[driven] = None
        driven.task = task = asyncio.Task(driven, loop=loop, **options)
        return task


class _Driven(collections.abc.Coroutine[Any, Any, Any]):
    """A coroutine whose waits are counted."""

    def __init__(self, coro: Coroutine[Any, Any, Any], injector: Injector) -> None:
        self.coro, self.injector = coro, injector
        self.target = str(getattr(coro, "__qualname__", ""))
        self.task: asyncio.Task[Any]
        self.awaited: Any = None
        """What it waits for."""
        self._pending: Fault | None = None

    def hit(self, fault: Fault) -> None:
        """The fault happens in the wait that it is in."""
        if issubclass(fault.error, asyncio.CancelledError):
            if fault.when == NOW:
                self.task.cancel()
            else:
                self.awaited.add_done_callback(lambda _: self.task.cancel())
            return
        self._pending = fault
        if fault.when == NOW:
            self.task.cancel()  # wakes it; `throw` makes the error of it

    def __await__(self) -> Any:
        return self.coro.__await__()

    def send(self, value: Any) -> Any:
        pending, self._pending = self._pending, None
        if pending is not None:
            return self._waits(lambda: self.coro.throw(pending.error("injected")))
        return self._waits(lambda: self.coro.send(value))

    def throw(self, *error: Any) -> Any:
        pending, self._pending = self._pending, None
        if pending is not None:
            self.task.uncancel()
            return self._waits(lambda: self.coro.throw(pending.error("injected")))
        return self._waits(lambda: self.coro.throw(*error))

    def close(self) -> None:
        self.coro.close()

    def _waits(self, step: Callable[[], Any]) -> Any:
        """Runs until the next wait; lets the fault happen there when it is due."""
        self.awaited = None
        self.awaited = awaited = step()
        fault = self.injector.armed
        if fault is None or not fault.due(self.target):
            return awaited
        if issubclass(fault.error, asyncio.CancelledError):
            if fault.when == NOW or awaited is None:
                asyncio.get_running_loop().call_soon(self.task.cancel)
            else:  # before the task's own callback: the result is there when the cancel comes
                awaited.add_done_callback(lambda _: self.task.cancel())
            return awaited
        if fault.when == LATER:
            self._pending = fault
            return awaited
        if awaited is not None:
            awaited._asyncio_future_blocking = False
        return self._waits(lambda: self.coro.throw(fault.error("injected")))
