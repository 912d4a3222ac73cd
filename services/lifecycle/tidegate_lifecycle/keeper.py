"""One task owns one model server, from the order to its verified end; it reports to the reconciler."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from tidegate_chassis.process import monotonic
from tidegate_lifecycle import logs
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.engines.base import Engine, Files
from tidegate_lifecycle.hub.prepare import Progress, Report, nothing
from tidegate_lifecycle.hub.words import HubFailed
from tidegate_lifecycle.messages import BecameReady, Died, Fetching, Gone, Launched, Message, StartEnded
from tidegate_lifecycle.probes import Probe
from tidegate_lifecycle.runtimes.base import Runtime, Server, StartFailed, StartSpec
from tidegate_lifecycle.sampling import Sampler

_T = TypeVar("_T")

log = structlog.get_logger("tidegate.keeper")

HEALTH_EVERY = 5.0
"""Seconds between two health checks of a server that is ready."""
HEALTH_FAILURES = 3
"""Consecutive failed checks after which it counts as dead."""
HUNG_GRACE = 2.0
"""Seconds from SIGTERM to SIGKILL for such a server: it has nothing left to finish in order."""
PROBE_TIMEOUT = 2.0


Prepare = Callable[[Model, Report], Awaitable[Files]]


@dataclass(frozen=True)
class Tools:
    """What a keeper works with."""

    runtime: Runtime
    probe: Probe
    post: Callable[[Message], None]
    prepare: Prepare = nothing
    """Downloads what a model's server needs; HubFailed."""


class _Ended(Exception):
    """The server's life is over: go and verify."""


class Keeper:
    """Owns one instance of a model that runs here. `stop` is synchronous; `run` is its task."""

    def __init__(self, instance_id: str, model: Model, engine: Engine, tools: Tools) -> None:
        self.id, self.model, self.engine, self.tools = instance_id, model, engine, tools
        self.server: Server | None = None
        self.sampler = Sampler(instance_id, tools.probe, tools.post)
        self._stop = asyncio.Event()
        self._grace = engine.stop_grace
        self._waits: list[asyncio.Task[Any]] = []

    def stop(self, grace: float | None = None) -> None:
        """Ends the server: SIGTERM, after `grace` seconds (its engine's when not given) SIGKILL.

        May be called again with less.
        """
        self._grace = self._grace if grace is None else min(self._grace, grace)
        if self._stop.is_set() and self.server is not None:
            self._background(self.tools.runtime.stop(self.server, self._grace))
        self._stop.set()

    async def start(self, spec: Callable[[str, int, Files], StartSpec], patience: float) -> None:
        """The life of a new server. `spec` is given a host, a port and files; `patience` are the seconds that
        it may take from its launch until it is ready: what goes before (downloads, a pull) doesn't count."""

        async def life() -> None:
            files = await self._downloaded()
            host, port = await self.tools.runtime.endpoint()
            try:
                self.server = await self._unless_stopped(self.tools.runtime.start(spec(host, port, files)))
            except StartFailed as error:
                self._post(StartEnded(self.id, "refused", f"the server can't be started: {error}"))
                raise _Ended from None
            launched = monotonic()
            self._post(Launched(self.id, self.server.address, self.server.pid, launched))
            await self._until_ready(self.server, launched + patience)
            await self._serve(self.server)

        await self._to_the_end(life)

    async def _downloaded(self) -> Files:
        """The model's files: found on disk, or downloaded first."""

        told: list[Progress] = []

        def report(progress: Progress) -> None:
            told[:] = [progress]
            self._post(Fetching(self.id, progress))

        try:
            return await self._unless_stopped(self.tools.prepare(self.model, report))
        except HubFailed as error:
            self._post(StartEnded(self.id, "download", f"the model can't be downloaded: {error}"))
            raise _Ended from None
        finally:
            if told:
                self._post(Fetching(self.id, None))

    async def _unless_stopped(self, work: Awaitable[_T]) -> _T:
        """What comes of it, unless it is told to stop first: a start may take as long as a download."""
        task, stop = self._background(work), self._background(self._stop.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()  # the runtime first ends what it has begun: nothing is freed before
            await asyncio.wait({task})
            raise _Ended
        result: _T = task.result()
        return result

    async def adopt(self, server: Server, ready: bool, deadline: float) -> None:
        """The life of a server that was found running; `deadline` is monotonic."""
        self.server = server

        async def life() -> None:
            if not ready:
                await self._until_ready(server, deadline)
            await self._serve(server)

        await self._to_the_end(life)

    async def _to_the_end(self, life: Callable[[], Awaitable[None]]) -> None:
        try:
            with contextlib.suppress(_Ended):
                await life()
            if self.server is not None:
                await self.tools.runtime.stop(self.server, self._grace)
            self._post(Gone(self.id))
        finally:
            for task in self._waits:
                task.cancel()

    async def _until_ready(self, server: Server, deadline: float) -> None:
        """1. told to stop; 2. ended by itself; 3. ready; 4. past its deadline: each leaves this wait."""
        began = monotonic()
        exited, stop = self._background(server.exited()), self._background(self._stop.wait())
        while True:
            probe = self._background(self.engine.ready(self.tools.probe, self.model, server.address))
            await asyncio.wait({exited, stop, probe}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():  # 1
                probe.cancel()
                raise _Ended
            if exited.done():  # 2
                probe.cancel()
                await self._fail("exited", f"the server ended before it was ready ({_how(exited.result())})")
            self._waits.remove(probe)
            if probe.result().ok:  # 3
                await self.tools.runtime.mark_ready(server)
                self._post(BecameReady(self.id))
                return
            if monotonic() >= deadline:  # 4
                await self._fail("deadline", "the server wasn't ready by its start deadline")
            # Short loads are noticed within milliseconds, long ones aren't polled hard.
            pause = min(1.0, max(0.02, (monotonic() - began) * 0.02))
            await asyncio.wait({exited, stop}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)

    async def _fail(self, kind: str, text: str) -> None:
        lines = await self.tools.runtime.tail(self.model.name, 400)
        told = logs.reason(lines, secrets=self.model.env.values())
        if kind == "exited":
            kind = logs.kind(lines) or kind
        self._post(StartEnded(self.id, kind, f"{text}: {told}" if told else text))
        raise _Ended

    async def _serve(self, server: Server) -> None:
        """Until it is told to stop, ends by itself (seen at once), or fails its health checks."""
        exited, stop = self._background(server.exited()), self._background(self._stop.wait())
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(self.sampler.run(server.address))
            unhealthy = group.create_task(self._watch(server))
            await asyncio.wait({exited, stop, unhealthy}, return_when=asyncio.FIRST_COMPLETED)
            sampling.cancel()
            unhealthy.cancel()
        if stop.done():
            return
        if exited.done():
            self._post(Died(self.id, f"the server ended ({_how(exited.result())})"))
        else:
            self._grace = min(self._grace, HUNG_GRACE)
            self._post(Died(self.id, f"{HEALTH_FAILURES} health checks failed ({unhealthy.result()})"))

    async def _watch(self, server: Server) -> str:
        """Checks its health; returns why it counts as dead."""
        failures = 0
        while True:
            await asyncio.sleep(HEALTH_EVERY)
            health = await self.tools.probe.get(server.address, self.model.health_path, PROBE_TIMEOUT)
            failures = 0 if health.ok else failures + 1
            if failures:
                log.warning("a health check failed", instance=self.id, failures=failures, why=health.detail)
            if failures >= HEALTH_FAILURES:
                return health.detail

    def _post(self, message: Message) -> None:
        self.tools.post(message)

    def _background(self, wait: Awaitable[Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(wait)
        self._waits.append(task)
        return task


def _how(ending: str) -> str:
    """How a server ended, with what an operator is to look for."""
    killed = ending == "signal 9"
    return f"{ending}: killed, by the kernel if the host ran out of memory" if killed else ending


class ExternalKeeper:
    """Watches one server that runs elsewhere: tells when it answers and when it no longer does."""

    def __init__(self, instance_id: str, model: Model, engine: Engine, address: str, tools: Tools) -> None:
        self.id, self.model, self.engine, self.address, self.tools = (
            instance_id,
            model,
            engine,
            address,
            tools,
        )
        self.sampler = Sampler(instance_id, tools.probe, tools.post)
        self._stop = asyncio.Event()
        self.server: Server | None = None

    def stop(self, grace: float | None = None) -> None:
        """Ends the watching; the server itself is left alone."""
        self._stop.set()

    async def run(self) -> None:
        """Its life: until it answers, while it answers, and the end."""
        told = False
        while not self._stop.is_set():
            health = await self.engine.ready(self.tools.probe, self.model, self.address)
            if health.ok:
                self.tools.post(BecameReady(self.id))
                break
            if not told:
                told = True
                self.tools.post(
                    StartEnded(self.id, "unhealthy", "the external server doesn't answer its health check")
                )
            await self._pause(1.0)
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(self.sampler.run(self.address))
            failures = await self._watch()
            sampling.cancel()
        if failures:
            self.tools.post(Died(self.id, "the external server no longer answers its health check"))
        self.tools.post(Gone(self.id))

    async def _watch(self) -> int:
        """Until it is told to stop, or the server fails its health checks: so many, one after the other."""
        failures = 0
        while not self._stop.is_set() and failures < HEALTH_FAILURES:
            await self._pause(HEALTH_EVERY if not failures else 1.0)
            health = await self.tools.probe.get(self.address, self.model.health_path, PROBE_TIMEOUT)
            failures = 0 if health.ok else failures + 1
        return failures

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
