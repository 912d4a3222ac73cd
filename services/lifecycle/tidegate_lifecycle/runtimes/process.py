"""Model servers as local processes.

Each is the leader of a session of its own, with a clean environment, no input, and its output in a bounded
file: never in a pipe, which stalls the server when nobody reads it and breaks when its reader is killed. So
a kill -9 of this process changes nothing for the servers; the next process finds them by their records.

Records are written and processes started by one thread, "the hand", in order: whoever reads the records
through it sees each start either not begun or done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import structlog

from tidegate_chassis.config import ConfigError, Problem
from tidegate_lifecycle.runtimes import family, launch, logfiles, procfs
from tidegate_lifecycle.runtimes.base import Lines, Server, Servers, StartFailed, StartSpec
from tidegate_lifecycle.runtimes.ports import Ports
from tidegate_lifecycle.runtimes.records import Record, Records
from tidegate_lifecycle.runtimes.starting import Starts
from tidegate_lifecycle.runtimes.stopping import Stopping, Stops

log = structlog.get_logger("tidegate.runtime")

_T = TypeVar("_T")
_Survey = tuple[list[tuple[Record, int | None]], list[Path]]

HOST = "127.0.0.1"
LEFTOVER_GRACE = 2.0
"""Seconds that children of a server may take to end once the server itself has."""
LOG_INTERVAL = 0.5
"""Seconds between two looks at the size of the log files."""


class ProcessServer:
    """A model server that is a process; see `Server`."""

    def __init__(self, record: Record, adopted: bool) -> None:
        self.record = record
        self.adopted = adopted
        """It was started by a process before this one: no child of ours, its exit status stays unknown."""
        self.age = procfs.age(record.started)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        state = self.ended.result() if self.ended.done() else "running"
        return f"<{self.instance_id} pid {self.pid} {state}{' adopted' if self.adopted else ''}>"

    @property
    def instance_id(self) -> str:
        return self.record.instance_id

    @property
    def model(self) -> str:
        return self.record.model

    @property
    def signature(self) -> str:
        return self.record.signature

    @property
    def address(self) -> str:
        return f"http://{self.record.host}:{self.record.port}"

    @property
    def device_ids(self) -> tuple[str, ...]:
        return tuple(self.record.device_ids)

    @property
    def reserved_mib(self) -> int:
        return self.record.reserved_mib

    @property
    def pid(self) -> int:
        return self.record.pid

    @property
    def was_ready(self) -> bool:
        return self.record.ready

    async def exited(self) -> str:
        return await asyncio.shield(self.ended)


class ProcessRuntime:
    """Starts model servers as local processes; see `Runtime`."""

    def __init__(self, data_dir: Path, environ: Mapping[str, str] = os.environ) -> None:
        self._data_dir = data_dir
        self._records = Records(data_dir / "instances")
        self._logs = logfiles.LogFolder(data_dir / "logs")
        self._environ = environ
        self._ports = Ports(HOST)
        self._hand = ThreadPoolExecutor(1, "tidegate-runtime")
        self._boot = ""
        self._servers: dict[str, ProcessServer] = {}
        self._pidfds: dict[str, int] = {}
        self._starts = Starts[ProcessServer](lambda server: self.stop(server, 0))
        self._stops = Stops()
        self._bounding: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Makes the folders; ConfigError when they can't be made, or when this is no fit system."""
        try:
            await self._by_hand(self._prepare)
        except OSError as error:
            reason = f"{error.filename or self._data_dir} can't be used: {error.strerror}"
            raise ConfigError([Problem("lifecycle.data_dir", reason)]) from error
        self._bounding = asyncio.create_task(self._bound_logs(), name="bound logs")

    async def close(self) -> None:
        """Stops watching; servers run on. Stops that are under way are finished first."""
        if self._bounding:
            self._bounding.cancel()
            await asyncio.wait([self._bounding])
        await self._starts.finish()
        await self._stops.finish()
        for instance_id in list(self._pidfds):
            self._unwatch(instance_id)
        await asyncio.to_thread(self._hand.shutdown)

    async def endpoint(self) -> tuple[str, int]:
        """127.0.0.1 and a port that is free now."""
        taken = {server.record.port for server in self._servers.values()}
        return HOST, self._ports.allocate(taken, asyncio.get_running_loop().time())

    # Starting

    async def start(self, spec: StartSpec) -> Server:
        """Writes the intent, starts the process, writes its pid; see `Runtime.start`."""
        if spec.instance_id in self._servers or spec.instance_id in self._starts:
            raise StartFailed(f"an instance {spec.instance_id} exists already")
        return await self._starts.carry_out(spec.instance_id, lambda: self._start(spec))

    async def _start(self, spec: StartSpec) -> ProcessServer:
        record, pidfd = await self._by_hand(self._launch, spec)
        server = ProcessServer(record, adopted=False)
        self._servers[spec.instance_id] = server
        self._watch(server, pidfd)
        log.info("server.started", instance=spec.instance_id, pid=record.pid, port=record.port)
        return server

    def _launch(self, spec: StartSpec) -> tuple[Record, int]:
        """In the hand. A crash after any line of it leaves a record that leads to what was started.

        Gives the record and a pidfd. Until it is waited for a child is there, be it dead.
        """
        pid = 0
        try:
            path = self._logs.create(spec.model, spec.instance_id)
            intent = self._intent(spec, path)
            self._records.write(intent)
            pid = launch.spawn(spec, path, self._environ)
            found = procfs.stat(pid)
            record = replace(intent, pid=pid, started=found.started if found else 0)
            self._records.write(record)
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError) as error:
            if pid:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            with contextlib.suppress(OSError):  # what can't be removed is swept by the next `list`
                self._records.remove(spec.instance_id)
            raise StartFailed(launch.why(error, spec)) from error
        return record, pidfd

    def _intent(self, spec: StartSpec, path: Path) -> Record:
        return Record(
            instance_id=spec.instance_id,
            model=spec.model,
            signature=spec.signature,
            host=spec.host,
            port=spec.port,
            device_ids=list(spec.device_ids),
            reserved_mib=spec.reserved_mib,
            log=str(path),
            boot=self._boot,
        )

    # Watching

    def _watch(self, server: ProcessServer, pidfd: int) -> None:
        """Notices the end of a process at once, be it a child or not."""
        self._pidfds[server.instance_id] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._on_end, server)

    def _unwatch(self, instance_id: str) -> None:
        pidfd = self._pidfds.pop(instance_id, None)
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    def _on_end(self, server: ProcessServer) -> None:
        self._unwatch(server.instance_id)
        words = "ended" if server.adopted else launch.reap(server.pid)
        if not server.ended.done():
            server.ended.set_result(words)

    async def mark_ready(self, server: Server) -> None:
        """Writes it into the record, unless the server is being stopped."""
        own = self._servers.get(server.instance_id)
        if own is None or own.was_ready or own.instance_id in self._stops:
            return
        own.record = replace(own.record, ready=True)
        try:
            await self._by_hand(self._records.write, own.record)
        except OSError as error:  # a full disk must not stop a server that works
            log.warning("record.unwritable", instance=own.instance_id, error=error.strerror)

    # Finding

    async def processes(self, server: Server) -> frozenset[int]:
        """The process and its kin; see `family.members`."""
        own = self._servers.get(server.instance_id)
        kin = await asyncio.to_thread(family.members, own.record) if own is not None else frozenset()
        return frozenset(pid for pid, _ in kin)

    async def list(self) -> Servers:
        """Adopts what runs, resolves intents, sweeps what is left of dead servers."""
        found, damaged = await self._by_hand(self._survey)
        for path in damaged:
            log.error("record.damaged", file=path.name, kept_as=f"{path.name}.damaged")
        for record, pidfd in found:
            if record.instance_id in self._servers or record.instance_id in self._starts:
                if pidfd is not None:
                    os.close(pidfd)
                continue
            server = ProcessServer(record, adopted=True)
            self._servers[record.instance_id] = server
            if pidfd is not None:
                self._watch(server, pidfd)
                log.info("server.adopted", instance=record.instance_id, pid=record.pid, model=record.model)
            else:
                server.ended.set_result("ended")
        dead = [server for server in self._servers.values() if server.ended.done() and server.adopted]
        await asyncio.gather(*(self.stop(server, 0) for server in dead))
        return [server for server in self._servers.values() if not server.ended.done()]

    def _survey(self) -> _Survey:
        """In the hand: each record, with a pidfd if its process runs, and damaged files. Resolves intents."""
        records, damaged = self._records.read()
        for path in damaged:
            os.replace(path, path.with_suffix(".json.damaged"))
        found = []
        for record in records:
            known = record if record.pid else family.resolve(record)
            if known != record:
                self._records.write(known)
            found.append((known, family.watch(known)))
        return found, damaged

    # Stopping

    async def stop(self, server: Server, grace: float) -> None:
        """See `Runtime.stop`. The work is a task of its own: a cancelled caller doesn't undo it."""
        own = self._servers.get(server.instance_id)
        if own is not None:
            await self._stops.join(own.instance_id, grace, lambda stopping: self._end(own, stopping))

    async def _end(self, server: ProcessServer, stopping: Stopping) -> None:
        """1. ask; 2. wait for the server, then for its children; 3. kill; 4. forget when all is gone."""
        loop = asyncio.get_running_loop()
        kin = await asyncio.to_thread(family.members, server.record)
        if stopping.kill_at > loop.time():
            await asyncio.to_thread(family.ask, server.record, kin)  # 1
            await stopping.wait(server.ended)  # 2
        stopping.kill_at = min(stopping.kill_at, loop.time() + LEFTOVER_GRACE)
        pause, said = 0.01, loop.time()
        while kin := await asyncio.to_thread(family.members, server.record, kin):
            if loop.time() >= stopping.kill_at:
                await asyncio.to_thread(family.kill, server.record, kin)  # 3
            if loop.time() > said + 30:
                said = loop.time()
                log.error("server.unkillable", instance=server.instance_id, pids=[pid for pid, _ in kin])
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.25)
        await self._forget(server)  # 4

    async def _forget(self, server: ProcessServer) -> None:
        """All of it is dead; the pidfd of a child that is to be waited for says so any moment."""
        await asyncio.wait({server.ended}, timeout=5)
        if not server.ended.done():
            self._on_end(server)
        try:
            await self._by_hand(self._records.remove, server.instance_id)
        except OSError as error:  # a record without a process is swept by the next `list` of a new process
            log.warning("record.unremovable", instance=server.instance_id, error=error.strerror)
        self._servers.pop(server.instance_id, None)
        log.info("server.gone", instance=server.instance_id, how=server.ended.result())

    # Logs

    async def tail(self, model: str, lines: int) -> Lines:
        """The last lines of the model's newest log."""
        return await asyncio.to_thread(self._logs.tail, model, lines)

    async def log_since(self, model: str, offset: int | None) -> tuple[Lines, int]:
        """What was written since; begins anew with a newer instance's log."""
        return await asyncio.to_thread(self._logs.since, model, offset)

    async def maintain(self) -> None:
        """Drops log files of servers that ended, beyond the newest few of each model."""
        used = {server.record.log for server in self._servers.values()}
        try:
            await self._by_hand(self._logs.drop, used)  # in the hand: never while a start makes its file
        except OSError as error:
            log.warning("logs.unreadable", error=error.strerror)

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_INTERVAL)
            for server in list(self._servers.values()):
                await asyncio.to_thread(logfiles.bound, Path(server.record.log))

    # Helpers

    def _prepare(self) -> None:
        self._data_dir = self._data_dir.resolve()  # /proc shows files by their real paths
        self._records = Records(self._data_dir / "instances")
        self._logs = logfiles.LogFolder(self._data_dir / "logs")
        for folder in (self._records.folder, self._logs.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied", str(folder))
        self._boot = procfs.boot_id()
        os.close(os.pidfd_open(os.getpid()))  # Linux 5.3

    async def _by_hand(self, function: Callable[..., _T], *args: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._hand, function, *args)
