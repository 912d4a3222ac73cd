"""An edge process between a fake control plane and a scripted model server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.edge.fakes import (
    Admission,
    Answer,
    Client,
    EdgeProcess,
    Lifecycle,
    ModelServer,
    Script,
    ask,
    control,
)

CHAT = "/v1/chat/completions"


@dataclass
class Bench:
    """Everything around one edge."""

    admission: Admission
    lifecycle: Lifecycle
    server: ModelServer
    edge: EdgeProcess
    stack: contextlib.AsyncExitStack

    async def chat(self, path: str = CHAT, **body: Any) -> Answer:
        """One chat request for `small`, to its end."""
        return await ask(self.edge.port, "POST", path, {"model": "small", **body})

    async def client(self) -> Client:
        """A connection that is closed after the test at the latest."""
        client = await Client.to(self.edge.port)
        self.stack.callback(client.leave)
        return client


Make = Callable[..., Awaitable[Bench]]


@contextlib.asynccontextmanager
async def standing(folder: Path, server: ModelServer, **edge: Any) -> AsyncIterator[Bench]:
    """One edge for many tests, before `server` unless `admission.address` says otherwise."""
    async with contextlib.AsyncExitStack() as stack:
        admission, lifecycle, address = await stack.enter_async_context(control())
        await stack.enter_async_context(server.running())
        admission.address = server.url
        process = EdgeProcess(folder, address, **edge)
        stack.push_async_callback(process.kill)
        await process.start()
        yield Bench(admission, lifecycle, server, process, stack)
        assert not [line for line in process.lines() if "exception" in line]
        assert admission.twice == 0


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes one: `await bench(script, **edge settings)`."""
    made: list[Bench] = []
    async with contextlib.AsyncExitStack() as stack:

        async def make(script: Script, ready: bool = True, **edge: Any) -> Bench:
            admission, lifecycle, address = await stack.enter_async_context(control())
            server = await stack.enter_async_context(ModelServer(script).running())
            admission.address = server.url
            process = EdgeProcess(tmp_path, address, **edge)
            stack.push_async_callback(process.kill)
            await process.start(ready)
            one = Bench(admission, lifecycle, server, process, stack)
            made.append(one)
            return one

        yield make
        assert not [line for one in made for line in one.edge.lines() if "exception" in line]
        assert [one.admission.twice for one in made] == [0] * len(made)
