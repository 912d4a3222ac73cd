"""The edge as a process: `python -m tidegate_edge --config FILE [--check]`."""

from __future__ import annotations

import asyncio
import gc
import sys

import structlog

from tidegate_chassis import process, telemetry
from tidegate_chassis.config import effective
from tidegate_edge.app import App
from tidegate_edge.catalog import Catalog
from tidegate_edge.downstream.server import Limits, Server, bind, url_of
from tidegate_edge.guard import Guard
from tidegate_edge.relay import DRAINING, Relay
from tidegate_edge.session import Session
from tidegate_edge.settings import EdgeSettings, Loaded, load, problems
from tidegate_edge.shared import Edge
from tidegate_edge.status import Status
from tidegate_edge.upstream import Upstream

log = structlog.get_logger("tidegate.edge")

_DRAIN = 5.0
"""Seconds that running requests have at the end."""
_LAST = 0.5
"""Seconds for each step after that; the process is gone within 7 s of the signal."""


async def serve(loaded: Loaded, stop: asyncio.Event) -> None:
    """Serves until `stop` is set, then drains. What a link to another service dies of is raised: fatal."""
    settings = loaded.edge
    session = Session(settings.admission_address, settings.control_grace)
    catalog = Catalog(settings.lifecycle_address)
    upstream = Upstream(settings.connect_timeout)
    edge = Edge(settings, session, catalog, upstream)
    status = Status(settings.admission_address, settings.lifecycle_address)
    guard = Guard(settings, loaded.keys_path, loaded.keys)
    edge.metrics.watch(guard.gauges)
    server = Server(App(edge, status, guard), _limits(settings), edge.refused)
    links = [asyncio.create_task(link.run()) for link in (session, catalog, guard)]
    try:
        listening = await asyncio.to_thread(bind, settings.listen)
        url = url_of(listening)
        await server.start(listening)
        await asyncio.to_thread(telemetry.serve_metrics, settings.metrics_listen, edge.metrics.registry)
        line = f"listening on {url}"
        log.info(line)
        waits = [asyncio.create_task(stop.wait()), *links]
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        waits[0].cancel()
        if not stop.is_set():
            for task in done:
                task.result()
            raise RuntimeError("a part of the edge has ended by itself")
        await _drain(edge, server)
    finally:
        await asyncio.gather(session.close(_LAST), server.stop(1.0))
        for link in links:
            link.cancel()
        await asyncio.wait(links, timeout=_LAST)
        await upstream.close()
        await status.close()


def _limits(settings: EdgeSettings) -> Limits:
    return Limits(
        connections=settings.max_connections,
        head=settings.max_head,
        head_timeout=settings.head_timeout,
        idle_timeout=settings.idle_timeout,
        write_timeout=settings.write_timeout,
    )


async def _drain(edge: Edge, server: Server) -> None:
    """No new requests; running ones have a while, then end with an error."""
    edge.draining = server.draining = True
    log.info("draining", in_flight=len(edge.relays))
    if not await edge.relays.gone(_DRAIN):
        log.warning("ending what still runs", in_flight=len(edge.relays))
        for relay in edge.relays.now():
            if isinstance(relay, Relay):
                relay.interrupt(DRAINING)
        await edge.relays.gone(_LAST)


def main() -> int:
    """Runs the service; returns its exit status."""
    path = process.command_line("edge", problems)
    loaded = load(path)
    telemetry.set_up("edge", loaded.telemetry)
    log.info("settings", edge=effective(loaded.edge), telemetry=effective(loaded.telemetry))
    # What was imported is never garbage; looking at it in every full collection is a pause for all streams.
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)
    try:
        return process.run(lambda stop: serve(loaded, stop))
    finally:
        telemetry.shut_down()


if __name__ == "__main__":
    sys.exit(main())
