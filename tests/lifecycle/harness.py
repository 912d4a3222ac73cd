"""The lifecycle service as a real process, and a fake admission that talks to it over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import yaml
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.gateway import GUARD
from tests.support.until import until
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate.lifecycle.v1 import lifecycle_pb2_grpc
from tidegate_chassis.rpc import channel

SERVER = Path(__file__).with_name("model_server.py")


def model(vram: str = "10GiB", *flags: str, **keys: Any) -> dict[str, Any]:
    """A model whose server is the tiny one."""
    command = [sys.executable, str(SERVER), "--port", "{port}", *flags]
    return {"engine": "command", "command": command, "vram": vram, **keys}


class Service:
    """A folder with a configuration, and the process that serves it."""

    def __init__(self, folder: Path, models: dict[str, Any], **lifecycle: Any) -> None:
        self.folder, self.socket = folder, f"unix:{folder}/l.sock"
        self.config = folder / "tidegate.yaml"
        self.log = folder / "service.log"
        settings = {
            "listen": self.socket,
            "data_dir": "./data",
            "devices": [{"id": "gpu0", "memory": "24GiB", "budget": 1}],
            "min_residency": "0s",
            "max_swap_wait": "100ms",
            "drain_timeout": "10s",
            **lifecycle,
        }
        self.config.write_text(yaml.safe_dump({"lifecycle": settings, "models": models}))
        self.process: asyncio.subprocess.Process | None = None

    async def spawn(self, *flags: str) -> asyncio.subprocess.Process:
        """Starts the process, whatever comes of it."""
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "tidegate_lifecycle", "--config", str(self.config), *flags]
            environ = os.environ | {"PYTHONPATH": str(GUARD)}  # a call that blocks the loop is an error in it
            return await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=environ)

    async def start(self) -> None:
        """Starts it and waits until its health is SERVING."""
        self.process = await self.spawn()
        async with asyncio.timeout(20), channel(self.socket) as connection:
            stub = health_pb2_grpc.HealthStub(connection)
            while True:
                with contextlib.suppress(aio.AioRpcError):
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=5)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.02)

    async def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(12):
            return await self.process.wait()

    async def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def said(self, words: str) -> None:
        """Waits until the log has the words: it is written by a thread of its own."""
        await until(lambda: words in self.log.read_text(), f"the log says: {words}")

    async def run(self, *flags: str) -> tuple[int, str]:
        """The process with flags, to its end; its status and what it said."""
        before = self.log.stat().st_size if self.log.exists() else 0
        process = await self.spawn(*flags)
        async with asyncio.timeout(20):
            status = await process.wait()
        return status, self.log.read_text()[before:]

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[lifecycle_pb2_grpc.LifecycleServiceAsyncStub]:
        """A client."""
        async with channel(self.socket) as connection:
            yield lifecycle_pb2_grpc.LifecycleServiceStub(connection)

    async def elapse(self, seconds: float) -> None:
        """Waits until so much time has passed by the service's own clock: for what must not happen in it."""
        async with self.stub() as stub, asyncio.timeout(seconds + 10):
            began = (await stub.GetStatus(pb.GetStatusRequest(), timeout=5)).uptime_ms
            passed = 0.0
            while passed < seconds:
                await asyncio.sleep(min(0.1, seconds - passed))
                passed = ((await stub.GetStatus(pb.GetStatusRequest(), timeout=5)).uptime_ms - began) / 1000

    async def status(self) -> pb.GetStatusResponse:
        """A snapshot."""
        async with self.stub() as stub:
            return await stub.GetStatus(pb.GetStatusRequest(), timeout=5)


class Admission:
    """Keeps a demand, states it whenever it changes, and acknowledges each supply at once."""

    def __init__(self, service: Service, incarnation: int = 7, settled: bool = True) -> None:
        self.service, self.incarnation, self.settled = service, incarnation, settled
        self.waiting: dict[str, int] = {}
        self.rates: dict[str, float] = {}
        """Arrivals a second."""
        self.interest: dict[str, float] = {}
        """Seconds by model."""
        self.leases: dict[str, int] = {}
        """Per instance id."""
        self.grants: dict[str, int] = {}
        self.roster: list[str] = ["edge-1"]
        self.models: dict[str, pb.ModelSupply] = {}
        self.reports: list[pb.SupplyReport] = []
        self.error: aio.AioRpcError | None = None
        self.acknowledge = True
        self._seen = pb.Generation()
        self._say: asyncio.Queue[None] = asyncio.Queue()
        self._news = asyncio.Condition()
        self._since = asyncio.get_running_loop().time()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Admission]:
        """The link, for a block."""
        async with channel(self.service.socket) as connection:
            stub = lifecycle_pb2_grpc.LifecycleServiceStub(connection)
            call = stub.Coordinate(wait_for_ready=True)
            tasks = [asyncio.create_task(self._write(call)), asyncio.create_task(self._read(call))]
            try:
                yield self
            finally:
                call.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(pb.CoordinateRequest(demand=self._demand()))
                await self._say.get()

    def _demand(self) -> pb.DemandReport:
        now = asyncio.get_running_loop().time()
        on = {i.instance_id: m.model for m in self.models.values() for i in m.instances}
        models = [
            pb.ModelDemand(
                model=name,
                waiting=self.waiting.get(name, 0),
                interest_ms=int(self.interest.get(name, 0.0) * 1000),
                oldest_wait_ms=int((now - self._since) * 1000),
                arrival_rate=self.rates.get(name, 0.0),
                instances=[
                    pb.InstanceDemand(
                        instance_id=i, leases=self.leases.get(i, 0), grants=self.grants.get(i, 0)
                    )
                    for i, owner in on.items()
                    if owner == name
                ],
            )
            for name in {*self.waiting, *self.interest, *on.values()}
        ]
        return pb.DemandReport(
            admission_incarnation=self.incarnation,
            uptime_ms=int((now - self._since) * 1000),
            whole=True,
            settled=self.settled,
            supply_seen=self._seen,
            models=models,
            roster=self.roster,
        )

    async def _read(self, call: Any) -> None:
        try:
            async for response in call:
                await self._take(response.supply)
        except aio.AioRpcError as error:
            self.error = error
            async with self._news:
                self._news.notify_all()

    async def _take(self, supply: pb.SupplyReport) -> None:
        self.reports.append(supply)
        if supply.whole:
            self.models.clear()
        self.models.update({entry.model: entry for entry in supply.models})
        if self.acknowledge:
            self._seen = supply.generation
            self._say.put_nowait(None)
        async with self._news:
            self._news.notify_all()

    def say(self, **waiting: int) -> None:
        """Changes who waits and states it."""
        self.waiting.update(waiting)
        self._say.put_nowait(None)

    def lease(self, instance_id: str, leases: int) -> None:
        """Changes the leases of an instance and states it."""
        self.grants[instance_id] = self.grants.get(instance_id, 0) + max(
            0, leases - self.leases.get(instance_id, 0)
        )
        self.leases[instance_id] = leases
        self._say.put_nowait(None)

    async def until(self, what: Callable[[], Any], timeout: float = 15.0) -> Any:
        """Waits until supply makes it true; returns what it gives."""
        try:
            async with asyncio.timeout(timeout), self._news:
                while not (found := what()):
                    await self._news.wait()
                return found
        except TimeoutError:
            raise AssertionError(f"{self.models}\n{self.service.log.read_text()[-4000:]}") from None

    def instance(self, name: str, state: int = pb.INSTANCE_STATE_READY) -> pb.InstanceSupply | None:
        """The first instance of a model in a state."""
        entry = self.models.get(name)
        return next((i for i in entry.instances if i.state == state), None) if entry else None

    async def ready(self, name: str) -> pb.InstanceSupply:
        """Waits for a ready instance, and takes the waiting tickets as granted and done."""
        found: pb.InstanceSupply = await self.until(lambda: self.instance(name))
        self.say(**{name: 0})
        return found

    async def gone(self, name: str, timeout: float = 15.0) -> None:
        """Waits until the model has no instance."""
        await self.until(lambda: name in self.models and not self.models[name].instances, timeout)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie doesn't)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
