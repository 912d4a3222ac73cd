"""Model servers as containers.

What Docker lists under this installation's label is the truth; the table here is made from it. A container is
seen to end by Docker's events; while their stream is away, and now and then anyway, everything is listed.
What bears our label and isn't known is an orphan (a create or start that was answered too late) and removed.
Containers without our label are never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path

import structlog

from tidegate_chassis.config import ConfigError, Problem
from tidegate_lifecycle.runtimes.base import Lines, Server, Servers, StartFailed, StartSpec
from tidegate_lifecycle.runtimes.docker import container as containers
from tidegate_lifecycle.runtimes.docker import place, words
from tidegate_lifecycle.runtimes.docker.container import DockerOptions, Listed
from tidegate_lifecycle.runtimes.docker.daemon import (
    Absent,
    Daemon,
    Declined,
    DockerFailed,
    NoAnswer,
    Patience,
)
from tidegate_lifecycle.runtimes.docker.images import Images
from tidegate_lifecycle.runtimes.docker.lastwords import LastWords
from tidegate_lifecycle.runtimes.docker.notes import Notes
from tidegate_lifecycle.runtimes.docker.ours import RETRY, Ours
from tidegate_lifecycle.runtimes.docker.server import DockerServer
from tidegate_lifecycle.runtimes.docker.smi import ContainerSmi
from tidegate_lifecycle.runtimes.docker.watch import Event, Watch
from tidegate_lifecycle.runtimes.starting import Starts
from tidegate_lifecycle.runtimes.stopping import Stopping, Stops

log = structlog.get_logger("tidegate.docker")

LOOK_EVERY = 10.0
"""Seconds between two listings while Docker's events are heard."""
LOOK_DEAF = 1.0
"""Seconds between two listings while they aren't."""
CLOSING = 5.0
"""Seconds that each part of closing may take: starts and stops under way, and the network."""
_HELP = "start Docker, let DOCKER_HOST say where it listens, or set lifecycle.runtime: process"


class DockerRuntime:
    """Runs model servers in containers; see `Runtime`."""

    def __init__(
        self,
        data_dir: Path,
        options: DockerOptions,
        environ: Mapping[str, str] = os.environ,
        patience: Patience | None = None,
        own_ids: Callable[[], Sequence[str]] = place.own_ids,
        random: Callable[[], str] = lambda: secrets.token_hex(3),
    ) -> None:
        self._data_dir, self._options, self._own_ids = data_dir, options, own_ids
        self._daemon = Daemon(patience, environ)
        self._images = Images(self._daemon, options.pull)
        self._random = random
        self._logs = LastWords(self._daemon, data_dir / "logs")
        self._notes = Notes(data_dir)
        self._ours = Ours(self._daemon, options, environ, random)
        self._servers: dict[str, DockerServer] = {}
        self._starts = Starts[DockerServer](lambda server: self.stop(server, 0))
        self._stops = Stops()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: Watch | None = None
        self._looking: asyncio.Task[None] | None = None
        self._look_now = asyncio.Event()
        self._hearing = False
        """Docker's events are heard."""
        self._orphans: set[str] = set()
        """Containers that are being removed and belong to no server."""
        self._listed = False
        """Servers of the process before this one are known: what isn't, is an orphan."""

    # Opening and closing

    async def open(self) -> None:
        """The daemon answers, the network is there, the folders can be written; else ConfigError."""
        try:
            self._ours.owner = await asyncio.to_thread(self._prepare)
        except OSError as error:
            reason = f"{error.filename or self._data_dir} can't be used: {error.strerror}"
            raise ConfigError([Problem("lifecycle.data_dir", reason)]) from error
        try:
            version = await self._daemon.call(self._daemon.patience.look, lambda client: client.version())
            ids = await asyncio.to_thread(self._own_ids)
            own = self._ours.own = await place.own_container(self._daemon, ids)
            self._ours.network = await place.settle_network(self._daemon, self._options.network, own)
        except DockerFailed as error:
            raise ConfigError([Problem("lifecycle.runtime", f"docker: {error}; {_HELP}")]) from error
        self._watch = Watch(self._daemon, self._ours.owner, self._happened, self._heard)
        self._looking = asyncio.create_task(self._keep_looking(), name="look at containers")
        log.info(
            "docker.ready",
            version=version.get("Version"),
            network=self._ours.network,
            installation=self._ours.owner,
            in_container=own is not None,
        )

    async def close(self) -> None:
        """Stops watching; containers run on. A network that was made here and isn't used goes."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSING)
        await self._starts.finish(CLOSING)
        await self._stops.finish(CLOSING)
        tasks = [*self._tasks, *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._images.close()
        if self._watch is not None:
            await asyncio.to_thread(self._watch.close)
            if self._ours.own is None:
                with contextlib.suppress(DockerFailed, TimeoutError):
                    async with asyncio.timeout(CLOSING):
                        await place.drop_network(self._daemon, self._ours.network)
        await asyncio.to_thread(self._daemon.close)

    def smi(self, image: str) -> ContainerSmi:
        """nvidia-smi in containers of that image; it may be asked once this is open."""
        return ContainerSmi(self._daemon, self._images, image, lambda: self._ours.owner, self._random)

    async def endpoint(self) -> tuple[str, int]:
        """Inside the container: every address, and the same port for all."""
        return containers.HOST, containers.PORT

    def _prepare(self) -> str:
        owner = self._notes.open()
        folder = self._data_dir / "logs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache = self._options.hub_cache
        if cache is not None:
            with contextlib.suppress(OSError):  # Docker says it, when a model needs the folder
                cache.mkdir(parents=True, exist_ok=True)
                if cache.stat().st_uid not in (0, 65534):
                    uid = cache.stat().st_uid
                    hint = "containers run without capabilities: root in them writes there only if others may"
                    log.warning("hub_cache.owner", uid=uid, hint=hint)
        return owner

    # Starting

    async def start(self, spec: StartSpec) -> Server:
        """Image, container, start; see `Runtime.start`. A container bears our label from its creation on."""
        if spec.instance_id in self._servers or spec.instance_id in self._starts:
            raise StartFailed(f"an instance {spec.instance_id} exists already")
        try:
            await self._images.ensure(spec.image)
        except DockerFailed as error:
            raise StartFailed(str(error)) from error
        return await self._starts.carry_out(spec.instance_id, lambda: self._start(spec))

    async def _start(self, spec: StartSpec) -> DockerServer:
        try:
            container_id = await self._ours.create(spec)
            await self._ours.run(container_id)
            server = DockerServer(await self._ours.inspect(container_id), adopted=False, ready=False)
        except NoAnswer as error:  # it may be made or started yet: removed as soon as it is seen
            self._look_now.set()
            raise StartFailed(str(error)) from error
        except DockerFailed as error:
            await self._remove_all(spec.instance_id)
            raise StartFailed(str(error)) from error
        self._servers[spec.instance_id] = server
        if not server.found.running:
            server.end(words.ending(server.found.state))
        log.info("server.started", instance=spec.instance_id, container=container_id[:12], image=spec.image)
        return server

    async def mark_ready(self, server: Server) -> None:
        """A file of its own, unless the server is being stopped: a label can't be changed."""
        own = self._servers.get(server.instance_id)
        if own is None or own.was_ready or own.instance_id in self._stops:
            return
        own.was_ready = True
        try:
            await asyncio.to_thread(self._notes.mark, own.instance_id)
        except OSError as error:  # a full disk must not stop a server that works
            log.warning("record.unwritable", instance=own.instance_id, error=error.strerror)

    # Seeing

    async def processes(self, server: Server) -> frozenset[int]:
        """What `docker top` shows."""
        own = self._servers.get(server.instance_id)
        if own is None or own.ended.done():
            return frozenset()
        try:
            return await self._ours.processes(own.container_id)
        except DockerFailed as error:
            log.debug("container.unreadable", instance=server.instance_id, reason=str(error))
            return frozenset()

    async def list(self) -> Servers:
        """Adopts what runs; removes what has ended, its last lines kept. DockerFailed without an answer."""
        for found in await self._ours.listing():
            if found.instance_id in self._servers or found.instance_id in self._starts:
                continue
            with contextlib.suppress(Absent):
                await self._take_in(found)
        self._listed = True
        self._look_now.set()
        dead = [server for server in self._servers.values() if server.ended.done() and server.adopted]
        await asyncio.gather(*(self.stop(server, 0) for server in dead))
        await asyncio.to_thread(self._notes.sweep, [*self._servers, *self._starts])
        return [server for server in self._servers.values() if not server.ended.done()]

    async def _take_in(self, found: Listed) -> None:
        inspected = await self._ours.inspect(found.id)
        ready = await asyncio.to_thread(self._notes.marked, found.instance_id)
        if found.instance_id in self._servers or found.instance_id in self._starts:
            return  # another call was first
        server = self._servers[found.instance_id] = DockerServer(inspected, adopted=True, ready=ready)
        if inspected.running:
            log.info("server.adopted", instance=server.instance_id, model=server.model)
        else:
            server.end(words.ending(inspected.state))
            log.info("server.swept", instance=server.instance_id, how=server.ended.result())

    def _heard(self, connected: bool) -> None:
        self._hearing = connected
        self._look_now.set()

    def _happened(self, event: Event) -> None:
        server = self._servers.get(event.instance_id)
        if server is not None and server.container_id == event.container_id:
            server.out_of_memory = server.out_of_memory or event.action == "oom"
            if event.action == "die":
                self._spawn(self._refresh(server))
            elif event.action == "destroy":
                server.end(words.REMOVED)
        elif event.action in ("create", "start") and event.instance_id not in self._starts:
            self._look_now.set()

    async def _keep_looking(self) -> None:
        """Lists everything: when the events begin to be heard, when something odd was, and now and then."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY if self._hearing else LOOK_DEAF):
                    await self._look_now.wait()
            self._look_now.clear()
            with contextlib.suppress(DockerFailed):
                await self._look()

    async def _look(self) -> None:
        """1. a server that isn't listed, or doesn't run: its end is taken in; 2. unknown: an orphan."""
        before = list(self._servers.values())
        found = await self._ours.listing()
        running = {one.id for one in found if one.running}
        for server in before:
            if server.container_id not in running and not server.ended.done():
                await self._refresh(server)  # 1
        for one in found if self._listed else ():
            known = one.instance_id in self._starts or one.instance_id in self._servers
            if not known and one.id not in self._orphans:
                log.warning("container.orphan", instance=one.instance_id, container=one.id[:12])
                self._spawn(self._remove_orphan(one.id))  # 2

    async def _remove_orphan(self, container_id: str) -> None:
        self._orphans.add(container_id)
        try:
            await self._ours.remove(container_id)
        finally:
            self._orphans.discard(container_id)

    async def _refresh(self, server: DockerServer) -> None:
        """Looks at one server; its end is taken in. Without an answer nothing changes."""
        try:
            found = await self._ours.inspect(server.container_id)
        except Absent:
            server.end(words.REMOVED)
        except DockerFailed as error:
            log.debug("container.unreadable", instance=server.instance_id, reason=str(error))
        else:
            if not found.running:
                server.end(words.ending(found.state, server.out_of_memory))

    # Stopping

    async def stop(self, server: Server, grace: float) -> None:
        """See `Runtime.stop`. The work is a task of its own: a cancelled caller doesn't undo it."""
        own = self._servers.get(server.instance_id)
        if own is not None:
            await self._stops.join(own.instance_id, grace, lambda stopping: self._end(own, stopping))

    async def _end(self, server: DockerServer, stopping: Stopping) -> None:
        """1. ask; 2. wait; 3. kill until it has ended; 4. keep its last lines; 5. remove it; 6. forget it."""
        loop = asyncio.get_running_loop()
        if stopping.kill_at > loop.time() and not server.ended.done():
            await self._signal(server, "SIGTERM")  # 1
            await stopping.wait(server.ended)  # 2
        pause = RETRY[0]
        while not server.ended.done():
            await self._signal(server, "SIGKILL")  # 3
            await asyncio.wait({server.ended}, timeout=pause)
            if not server.ended.done():
                await self._refresh(server)
            pause = min(RETRY[1], pause * 2)
        found = server.found
        await self._logs.keep(found.model, found.instance_id, found.id, found.started)  # 4
        await self._ours.remove(server.container_id)  # 5
        with contextlib.suppress(OSError):  # a note of a server that is gone is swept by the next `list`
            await asyncio.to_thread(self._notes.forget, server.instance_id)  # 6
        self._servers.pop(server.instance_id, None)
        log.info("server.gone", instance=server.instance_id, how=server.ended.result())

    async def _signal(self, server: DockerServer, name: str) -> None:
        try:
            await self._ours.signal(server.container_id, name)
        except Absent:
            server.end(words.REMOVED)
        except Declined:  # it doesn't run any more
            await self._refresh(server)
        except NoAnswer as error:
            log.warning("server.unreachable", instance=server.instance_id, signal=name, reason=str(error))

    async def _remove_all(self, instance_id: str) -> None:
        """Whatever there is of an instance that never came to be; what can't be done now `_look` does."""
        try:
            for found in await self._ours.listing(instance_id):
                await self._ours.remove(found.id)
        except DockerFailed:
            self._look_now.set()

    # Logs

    async def tail(self, model: str, lines: int) -> Lines:
        """The last lines of the model's newest container, or what was kept of it."""
        return await self._logs.tail(model, self._newest(model), lines)

    async def log_since(self, model: str, offset: int | None) -> tuple[Lines, int]:
        """What was written since; goes on with a newer instance's log."""
        return await self._logs.since(model, self._newest(model), offset)

    async def maintain(self) -> None:
        """Drops kept logs beyond the newest few of each model."""
        await self._logs.drop()

    def _newest(self, model: str) -> str | None:
        mine = [server for server in self._servers.values() if server.model == model]
        newest = max(mine, key=lambda server: server.found.started, default=None)
        return newest.container_id if newest is not None else None

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
