"""Blocking work in threads that don't keep the process from ending, each with a deadline for its caller."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


def begin(function: Callable[[], _T], name: str) -> Future[_T]:
    """Runs it in a daemon thread of its own."""
    future: Future[_T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - whatever it was, its caller gets it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


async def within(deadline: float, function: Callable[[], _T], name: str) -> _T:
    """Its result; TimeoutError after `deadline` seconds, and then the thread is left to its own timeouts."""
    async with asyncio.timeout(deadline):
        return await asyncio.wrap_future(begin(function, name))
