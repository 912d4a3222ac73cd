"""The edge as a process: `python -m tidegate_edge --config FILE [--check]`; a master of several when
`edge.workers` says so, which starts each worker as `... --worker NUMBER:DESCRIPTOR`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import socket
import sys
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from tidegate_chassis import logs, process, rpc, telemetry
from tidegate_chassis.config import EXIT_CONFIG, ConfigError, effective
from tidegate_chassis.tls import Certificates
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
from tidegate_edge.workers.link import Link
from tidegate_edge.workers.master import Master
from tidegate_edge.workers.peers import Member, Post

log = structlog.get_logger("tidegate.edge")

_DRAIN = 5.0
"""Seconds that running requests have at the end."""
_LAST = 0.5
"""Seconds for each step after that; the process is gone within 7 s of the signal."""
_READY = 3.0
"""Seconds that a worker waits for admission and the catalogue before it takes connections all the same."""


async def serve(
    loaded: Loaded, stop: asyncio.Event, certificates: Certificates | None = None, post: Post | None = None
) -> None:
    """Serves until `stop` is set, or as one of several workers until it retires; then drains. What a link to
    another service dies of is raised: fatal. `certificates`: for clients; None = HTTP is plain."""
    settings = loaded.edge
    session = Session(settings.admission_address, settings.control_grace)
    catalog = Catalog(settings.lifecycle_address)
    upstream = Upstream(settings.connect_timeout)
    edge = Edge(settings, session, catalog, upstream)
    status = Status(settings.admission_address, settings.lifecycle_address)
    guard = Guard(settings, loaded.keys_path, loaded.keys)
    edge.metrics.watch(guard.gauges)
    server = edge.connections = Server(App(edge, status, guard), _limits(settings), edge.refused)
    links = [asyncio.create_task(link.run()) for link in (session, catalog, guard)]
    links.append(asyncio.create_task(rpc.watch_certificates()))
    if certificates is not None:
        links.append(asyncio.create_task(certificates.watch()))
    member: Member | None = None
    try:
        if post is None:
            listening = await asyncio.to_thread(bind, settings.listen)
            url = url_of(listening, certificates is not None)
            await server.start(listening, certificates)
            await asyncio.to_thread(telemetry.serve_metrics, settings.metrics_listen, edge.metrics.registry)
            line = f"listening on {url}"
            log.info(line)
        else:
            member = edge.peers = Member(edge, await Link.over(post.link), stop)
            member.begin(post.renew)
            # Requests that come are for workers that can serve them, while there are others.
            both = asyncio.gather(session.available(_READY), catalog.available(_READY))
            await _over(links, stop.wait(), both)
            await server.start(post.listening, certificates, (post.board, post.cell))
            member.listens()
        await _over(links, stop.wait(), edge.peers.retiring.wait())
        if member is not None:
            server.close_port()  # at once: others may take who comes, or the next master wants the port
        if not stop.is_set():
            log.info("retiring", connections=len(server), in_flight=len(edge.relays))
            server.retire()
            await _over(links, stop.wait(), server.emptied(), within=settings.drain_timeout)
        await _drain(edge, server, _DRAIN if stop.is_set() else 0.0)
    finally:
        await asyncio.gather(session.close(_LAST), server.stop(1.0))
        for link in links:
            link.cancel()
        if member is not None:
            await member.leave(_LAST)
        await asyncio.wait(links, timeout=_LAST)
        await upstream.close()


async def _over(
    links: Sequence[asyncio.Task[None]], *waits: Awaitable[Any], within: float | None = None
) -> None:
    """Waits for the first of `waits`, at most `within` seconds. What a link has died of is raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait([*tasks, *links], timeout=within, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    if done.isdisjoint(tasks) and done:
        for link in done:
            link.result()
        raise RuntimeError("a part of the edge has ended by itself")


def _limits(settings: EdgeSettings) -> Limits:
    return Limits(
        connections=settings.max_connections,
        head=settings.max_head,
        head_timeout=settings.head_timeout,
        idle_timeout=settings.idle_timeout,
        write_timeout=settings.write_timeout,
    )


async def _drain(edge: Edge, server: Server, patience: float) -> None:
    """No new requests; running ones have `patience` seconds, then end with an error."""
    edge.draining = server.draining = True
    log.info("draining", in_flight=len(edge.relays))
    if not await edge.relays.gone(patience):
        log.warning("ending what still runs", in_flight=len(edge.relays))
        for relay in edge.relays.now():
            if isinstance(relay, Relay):
                relay.interrupt(DRAINING)
        await edge.relays.gone(_LAST)


def main() -> int:
    """Runs the service; returns its exit status."""
    if "--worker" in sys.argv:
        return _work()
    path = process.command_line("edge", problems)
    loaded = load(path)
    if loaded.edge.workers > 1:
        return _lead(path, loaded)
    telemetry.set_up("edge", loaded.telemetry)
    _log_settings(loaded)
    return _run(loaded)


def _lead(path: Path, loaded: Loaded) -> int:
    """As the master of several workers."""
    logs.set_up("edge", loaded.telemetry)
    _log_settings(loaded)
    hangup = asyncio.Event()
    try:
        return process.run(lambda stop: Master(path, loaded).run(stop, hangup), hangup)
    finally:
        logs.flush(1.0)


def _work() -> int:
    """As one of the workers; the master has checked the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    post = Post.taken(socket.socket(fileno=int(arguments.worker.partition(":")[2])))
    try:
        loaded = load(arguments.config)
    except ConfigError as error:
        for problem in error.problems:
            print(f"tidegate edge: {problem}", file=sys.stderr)
        return EXIT_CONFIG
    loaded = replace(loaded, edge=loaded.edge.share(post.count))
    telemetry.set_up("edge", loaded.telemetry, post.number)
    return _run(loaded, post)


def _run(loaded: Loaded, post: Post | None = None) -> int:
    rpc.secure(loaded.tls)
    certificates = Certificates(loaded.https) if loaded.https else None
    # What was imported is never garbage; looking at it in every full collection is a pause for all streams.
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)
    try:
        return process.run(lambda stop: serve(loaded, stop, certificates, post), post.renew if post else None)
    finally:
        telemetry.shut_down()


def _log_settings(loaded: Loaded) -> None:
    log.info("settings", edge=effective(loaded.edge), telemetry=effective(loaded.telemetry))


if __name__ == "__main__":
    sys.exit(main())
