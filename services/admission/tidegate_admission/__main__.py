"""`python -m tidegate_admission --config FILE [--check]`: the admission service as a process."""

from __future__ import annotations

import asyncio
import gc
import random
import secrets
import sys
from pathlib import Path
from typing import Any

import structlog

from tidegate.admission.v1 import admission_pb2_grpc
from tidegate_admission import metrics, settings, waits
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.limits import Limits
from tidegate_admission.link import Link, SupersededError
from tidegate_admission.service import NAME, Service
from tidegate_admission.settings import Loaded
from tidegate_admission.ticket import Reason
from tidegate_admission.timer import Timer
from tidegate_chassis import process, rpc, telemetry
from tidegate_chassis.config import ConfigError, Problem

STOP_GRACE = 1.0
"""Seconds for running calls to end when the service stops."""

log = structlog.get_logger("tidegate.admission")


async def serve(loaded: Loaded, stop: asyncio.Event) -> None:
    """Runs the service until `stop` is set. An exception out of the core ends it."""
    own, clock = loaded.admission, process.monotonic
    incarnation = secrets.randbits(63) | 1
    limits = Limits(own.max_concurrent, own.max_queue, own.queue_timeout, own.aging, loaded.tenants)
    dispatcher = Dispatcher(limits, own.lease_ttl, clock(), random.random)
    if telemetry.traced():
        dispatcher.books.on_wait_end = waits.report
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()
    service = Service(dispatcher, incarnation, clock, lambda error: _fail(failed, error))
    server = rpc.Server(own.listen, "admission.listen", [NAME])
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(service, server.server)
    gaps = metrics.Gaps()
    collector = metrics.AdmissionCollector(dispatcher, gaps, loop, clock)
    await _serve_metrics(own.metrics_listen, collector)
    address = await server.start()
    log.info("config.effective", **loaded.effective())
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(Link(loaded.lifecycle_address, incarnation, dispatcher, clock).run()),
        asyncio.create_task(Timer(dispatcher, gaps, clock).run()),
        asyncio.create_task(rpc.watch_certificates()),
        asyncio.create_task(stop.wait()),
    ]
    gc.freeze()  # what exists now lives as long as the process: the collector needn't look at it again
    gc.set_threshold(5_000, 20, 20)  # nor so often at tickets that wait; nothing here makes cycles by itself
    try:
        await server.set_serving(True)
        log.info("admission.listening", address=address, incarnation=incarnation)
        ends: list[asyncio.Future[Any]] = [*tasks, failed]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for ended in done:
            ended.result()
    except SupersededError:
        log.error("admission.superseded", meaning="a newer admission took over; this one ends")
        service.close(Reason.SUPERSEDED)
        raise
    finally:
        service.close(Reason.DRAINING)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop(STOP_GRACE)


async def _serve_metrics(listen: str, collector: metrics.AdmissionCollector) -> None:
    try:
        await asyncio.to_thread(telemetry.serve_metrics, listen, metrics.registry(collector))
    except OSError as error:
        words = f"can't listen on {listen} ({error.strerror}); `ss -ltnp` shows who does"
        raise ConfigError([Problem("admission.metrics_listen", words)]) from None


def _fail(failed: asyncio.Future[None], error: Exception) -> None:
    if not failed.done():
        failed.set_exception(error)


def main() -> int:
    """The command."""
    path: Path = process.command_line("admission", settings.problems)
    loaded = settings.load(path)
    telemetry.set_up("admission", loaded.telemetry)
    rpc.secure(loaded.tls)
    try:
        return process.run(lambda stop: serve(loaded, stop))
    finally:
        telemetry.shut_down()


if __name__ == "__main__":
    sys.exit(main())
