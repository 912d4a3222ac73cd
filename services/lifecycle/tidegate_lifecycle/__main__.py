"""`python -m tidegate_lifecycle --config FILE [--check | --sweep]`: the service as a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import structlog

from tidegate.lifecycle.v1 import lifecycle_pb2_grpc
from tidegate_chassis import process, rpc, telemetry
from tidegate_chassis.config import ConfigError, Problem, effective
from tidegate_lifecycle import metrics
from tidegate_lifecycle.adoption import judge
from tidegate_lifecycle.configfile import ConfigFile
from tidegate_lifecycle.devices import Device, Devices, HostSmi, Smi
from tidegate_lifecycle.devices.smi import PROGRAM
from tidegate_lifecycle.devices.watch import DeviceWatch
from tidegate_lifecycle.estimating import Estimator
from tidegate_lifecycle.fleet import Fleet
from tidegate_lifecycle.footprints.meter import Meter
from tidegate_lifecycle.footprints.store import FootprintStore
from tidegate_lifecycle.hub import prepare
from tidegate_lifecycle.hub.cache import Cache
from tidegate_lifecycle.hub.prepare import Preparer
from tidegate_lifecycle.keeper import Prepare, Tools
from tidegate_lifecycle.link import Link
from tidegate_lifecycle.messages import Shutdown
from tidegate_lifecycle.modelfiles import ModelFiles
from tidegate_lifecycle.probes import Probe
from tidegate_lifecycle.reconciler import Reconciler
from tidegate_lifecycle.runtimes.base import Runtime
from tidegate_lifecycle.runtimes.docker.container import HUB_FOLDER, DockerOptions, Limits
from tidegate_lifecycle.runtimes.docker.runtime import DockerRuntime
from tidegate_lifecycle.runtimes.process import ProcessRuntime
from tidegate_lifecycle.service import SERVICE, LifecycleServicer
from tidegate_lifecycle.settings import Loaded, load, policy, problems
from tidegate_lifecycle.store import Store

log = structlog.get_logger("tidegate.lifecycle")

DRAIN = 5.0
"""Seconds that drains may take when the service stops."""
STOP = 9.0
"""Seconds after which the service ends whatever still runs."""
HOUSEKEEPING = 10.0
"""Seconds between two clean-ups of the log files."""
SWEEP_GRACE = 3.0


def main() -> int:
    """The process; returns its exit status."""
    sweeping = "--sweep" in sys.argv
    if sweeping:
        sys.argv.remove("--sweep")
    config = process.command_line("lifecycle", problems)
    loaded = load(config)
    telemetry.set_up("lifecycle", loaded.telemetry)
    rpc.secure(loaded.tls)
    hangup = asyncio.Event()
    status = process.run(lambda stop: sweep(loaded) if sweeping else serve(loaded, stop, hangup), hangup)
    telemetry.shut_down()
    return status


async def sweep(loaded: Loaded) -> None:
    """Stops every model server that the records show, whoever started it. ConfigError when the data
    directory is in use: then its owner is alive and does that itself."""
    folder = loaded.data_dir
    store, runtime = Store(folder), runtime_of(loaded)
    await store.lock()
    try:
        await runtime.open()
        servers = await runtime.list()
        await asyncio.gather(*(runtime.stop(server, SWEEP_GRACE) for server in servers))
        log.info("swept", servers=len(servers))
        await runtime.close()
    finally:
        await store.close()


def runtime_of(loaded: Loaded) -> Runtime:
    """The runtime that the configuration names."""
    if loaded.lifecycle.runtime == "process":
        return ProcessRuntime(loaded.data_dir)
    docker = loaded.lifecycle.docker
    limits = Limits(docker.shm_size, docker.memory, docker.cpus, docker.pids)
    return DockerRuntime(
        loaded.data_dir, DockerOptions(docker.network, docker.pull, limits, loaded.hub_cache)
    )


def cache_of(loaded: Loaded) -> Cache:
    """The hub's cache: the one that processes look in, or that containers mount."""
    folder, given = loaded.hub_cache, "hf_cache" in loaded.lifecycle.model_fields_set
    named = given or loaded.lifecycle.runtime == "docker"
    return Cache.of(os.environ) if folder is None or not named else Cache.at(folder)


def prepare_of(loaded: Loaded) -> Prepare:
    """What downloads models' files."""
    if loaded.lifecycle.runtime == "process":
        return Preparer(cache_of(loaded)).prepare
    return prepare.nothing if loaded.hub_cache is None else Preparer(cache_of(loaded), HUB_FOLDER).prepare


def smi_of(loaded: Loaded, runtime: Runtime) -> Smi:
    """What reads the cards: nvidia-smi on this machine, or without it, where containers run, in one."""
    local = os.environ.get("DOCKER_HOST", "unix://").startswith("unix://")
    if not isinstance(runtime, DockerRuntime) or (local and shutil.which(PROGRAM)):
        return HostSmi()
    return runtime.smi(loaded.lifecycle.docker.smi_image)


async def serve(loaded: Loaded, stop: asyncio.Event, hangup: asyncio.Event) -> None:
    """The service, from its first look at the machine to the last model server's end. `hangup` is set when
    the configuration is to be read again at once."""
    settings = loaded.lifecycle
    log.info("settings in effect", **effective(settings), models=sorted(loaded.catalog.models))
    async with contextlib.AsyncExitStack() as stack:
        store = Store(loaded.data_dir)
        stack.push_async_callback(store.close)
        await store.lock()
        boot = await store.open()
        runtime, probe = runtime_of(loaded), Probe()
        await runtime.open()
        stack.push_async_callback(runtime.close)
        stack.push_async_callback(probe.close)
        smi = await asyncio.to_thread(smi_of, loaded, runtime)
        devices = Devices(loaded.devices, smi)
        stack.push_async_callback(devices.close)
        readings = await devices.open() if loaded.needs_devices else []
        meter = Meter(devices, smi, runtime, settings.footprints) if readings else None
        fleet = await _fleet(stack, loaded, store, boot, readings, meter)
        reconciler = Reconciler(fleet)
        files = ModelFiles(cache_of(loaded), loaded.folder)
        reconciler.estimator = Estimator(files.shape, reconciler.post)
        stack.push_async_callback(reconciler.estimator.close)
        servicer = LifecycleServicer(reconciler, runtime)
        server = rpc.Server(settings.listen, "lifecycle.listen", [SERVICE])
        lifecycle_pb2_grpc.add_LifecycleServiceServicer_to_server(servicer, server.server)
        address = await server.start()
        stack.push_async_callback(server.stop, 0.5)
        _serve_metrics(settings.metrics_listen)
        found = await judge(await runtime.list(), loaded.catalog, readings, probe)
        tools = Tools(runtime, probe, reconciler.post, prepare_of(loaded))
        work = asyncio.ensure_future(reconciler.run(tools, found))
        tasks = (
            work,
            asyncio.ensure_future(_keep_house(runtime)),
            asyncio.ensure_future(_read_devices(devices, reconciler)),
            asyncio.ensure_future(ConfigFile(loaded, reconciler.post).run(hangup)),
            asyncio.ensure_future(rpc.watch_certificates()),
        )
        stack.push_async_callback(_end, fleet, *tasks)
        await _first(asyncio.ensure_future(reconciler.settled.wait()), work)
        await server.set_serving(True)
        log.info("listening", address=address, boot=boot, adopted=sum(not item.unwanted for item in found))
        await _first(asyncio.ensure_future(stop.wait()), *tasks)
        await server.set_serving(False)
        if settings.on_stop == "stop":
            reconciler.post(Shutdown(DRAIN))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP):
                    await _first(asyncio.ensure_future(reconciler.finished.wait()), work)
        log.info("stopped", model_servers_left=len(fleet.instances))


async def _fleet(
    stack: contextlib.AsyncExitStack,
    loaded: Loaded,
    store: Store,
    boot: int,
    readings: Sequence[Device],
    meter: Meter | None,
) -> Fleet:
    """The fleet by what is remembered of earlier boots."""
    fleet = Fleet(
        loaded.catalog,
        policy(loaded.lifecycle),
        loaded.folder,
        boot,
        Link(boot, await store.roster(), await store.no_admission()),
        store,
        readings,
        await store.load_times(),
        await store.taken(),
    )
    kept = FootprintStore(loaded.data_dir)
    stack.push_async_callback(kept.close)
    fleet.footprints.open(kept, meter, await kept.load())
    return fleet


async def _first(event: asyncio.Future[Any], *others: asyncio.Future[Any]) -> None:
    """Waits for the event; another one that ends before it has failed, and its error is fatal."""
    try:
        await asyncio.wait({event, *others}, return_when=asyncio.FIRST_COMPLETED)
        for other in others:
            if other.done():
                other.result()
    finally:
        event.cancel()


async def _end(fleet: Fleet, *tasks: asyncio.Future[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await fleet.let_go()


async def _keep_house(runtime: Runtime) -> None:
    while True:
        await asyncio.sleep(HOUSEKEEPING)
        await runtime.maintain()


async def _read_devices(devices: Devices, reconciler: Reconciler) -> None:
    """Reads them as long as the service lives, if there are any that the driver shows."""
    if not devices.asks_driver or not reconciler.fleet.devices:
        await asyncio.Event().wait()
    watch = DeviceWatch(devices, reconciler.post)
    reconciler.fleet.hurry = watch.hurry
    await watch.run()


def _serve_metrics(listen: str) -> None:
    try:
        telemetry.serve_metrics(listen, metrics.REGISTRY)
    except OSError as error:
        text = f"can't listen on {listen} ({error.strerror}); `ss -ltnp` shows who does"
        raise ConfigError([Problem("lifecycle.metrics_listen", text)]) from None


if __name__ == "__main__":
    sys.exit(main())
