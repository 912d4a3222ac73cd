"""The parts that make several processes one edge: sums, shared accepting, the link."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest

from tests.edge.fakes import EdgeProcess
from tests.support.figures import Figures
from tests.support.until import until
from tidegate_edge.downstream.accept import Acceptor, Board
from tidegate_edge.downstream.server import bind
from tidegate_edge.metrics import Metrics
from tidegate_edge.workers.link import Link
from tidegate_edge.workers.sums import Sums, taken


def process(requests: int, in_flight: float) -> Metrics:
    """A process's metrics after some requests."""
    metrics = Metrics()
    metrics.watch(lambda: {"in_flight": in_flight, "keys": 3 + in_flight})
    for number in range(requests):
        metrics.requests("small", "200", "ok")()
        metrics.duration("small")(0.01 * number)
    return metrics


def test_what_the_dead_have_counted_stays_and_their_gauges_go() -> None:
    """Counters and histograms add up over all processes there ever were; gauges over those that live, but
    for those that tell the same everywhere."""
    one, two, dead = process(3, 1), process(4, 2), process(5, 7)
    dead.refused("queue_full")()
    ended, sums = Sums(), Sums()
    ended.add(taken(dead.registry), ended=True)
    for families in (ended.families(), taken(one.registry), taken(two.registry)):
        sums.add(families)
    figures = Figures(generate_latest(sums).decode())
    assert figures.total("tidegate_edge_requests_total", model="small", status="200") == 12
    assert figures.total("tidegate_edge_request_duration_seconds_count") == 12
    assert figures.total("tidegate_edge_request_duration_seconds_bucket", le="0.005") == 3
    assert figures.total("tidegate_edge_refusals_total", code="queue_full") == 1
    assert figures.total("tidegate_edge_in_flight") == 3
    assert figures.total("tidegate_edge_keys") == 5


def test_one_process_summed_is_what_it_says_itself() -> None:
    """Nothing is lost or renamed on the way: the text is the same."""
    metrics = process(3, 1)
    sums = Sums()
    sums.add(taken(metrics.registry))
    assert generate_latest(sums) == metrics.text()


class Taker:
    """A process that shares a socket, but for the process: an acceptor and its connections."""

    def __init__(self, listening: Any, board: Board, cell: int) -> None:
        self.made: list[asyncio.Protocol] = []
        self.acceptor = Acceptor(listening, board, cell, self._protocol, lambda: len(self.made))

    def _protocol(self) -> asyncio.Protocol:
        self.made.append(asyncio.Protocol())
        return self.made[-1]


async def connected(port: int) -> asyncio.StreamWriter:
    """A client's connection, as far as the kernel knows."""
    return (await asyncio.open_connection("127.0.0.1", port))[1]


async def test_connections_go_to_who_has_the_fewest() -> None:
    """One after the other they are shared out evenly; who has left the board doesn't count."""
    first = bind("127.0.0.1:0")
    board = Board(4)
    takers = [Taker(first, board, 0), Taker(first.dup(), Board(4, os.dup(board.fd)), 1)]
    port = first.getsockname()[1]
    writers = []
    for _ in range(10):
        writers.append(await connected(port))
        await until(lambda: sum(len(one.made) for one in takers) == len(writers), "it is taken")
    assert [len(one.made) for one in takers] == [5, 5]
    assert (board[0], board[1], board.least()) == (5, 5, 5)
    takers[1].acceptor.close()
    for _ in range(3):
        writers.append(await connected(port))
        await until(lambda: sum(len(one.made) for one in takers) == len(writers), "it is taken")
    assert (len(takers[0].made), board[1]) == (8, -1)
    takers[0].acceptor.close()
    for writer in writers:
        writer.transport.abort()


async def test_a_connection_that_nobody_takes_is_taken() -> None:
    """A process that stands still and has the fewest doesn't keep clients waiting."""
    listening = bind("127.0.0.1:0")
    port = listening.getsockname()[1]
    board = Board(4)
    board.write(1, 0)  # its owner never looks at the socket
    taker = Taker(listening, board, 0)
    writers = [await connected(port) for _ in range(3)]
    await until(lambda: len(taker.made) == 3, "all are taken")
    taker.acceptor.close()
    for writer in writers:
        writer.transport.abort()


async def test_a_system_without_descriptors_is_asked_again() -> None:
    """EMFILE: the acceptor rests instead of spinning, and takes the connection when it can."""

    class Full(socket.socket):
        refusals = 1

        def accept(self) -> Any:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().accept()

    listening = Full(fileno=bind("127.0.0.1:0").detach())
    listening.setblocking(False)
    taker = Taker(listening, Board(2), 0)
    writer = await connected(listening.getsockname()[1])
    await until(lambda: taker.made, "it is taken")
    assert listening.refusals == 0
    taker.acceptor.close()
    writer.transport.abort()


async def test_questions_over_the_link_have_answers_or_an_end() -> None:
    """An answer goes to who asked; silence ends by the deadline, the other side's end at once."""
    ours, theirs = socket.socketpair()
    here, there = await Link.over(ours), await Link.over(theirs)
    heard: list[dict[str, Any]] = []
    hearing = [asyncio.create_task(here.hear(heard.append)), asyncio.create_task(there.hear(heard.append))]
    slow = asyncio.create_task(here.ask("slow", 30))
    quick = asyncio.create_task(here.ask("quick", 30))
    await until(lambda: len(heard) == 2, "both were asked")
    there.say(answer=["x" * 300_000], number=heard[1]["number"])
    assert await quick == ["x" * 300_000]
    assert await here.ask("never", 0.01) is None
    there.close()
    assert await slow is None
    await hearing[0]
    assert await here.ask("nobody", 30) is None
    here.close()
    await asyncio.gather(*hearing)


async def test_a_port_that_is_taken_ends_the_master(tmp_path: Path) -> None:
    """Status 78, with the port's name and what to do, before any worker is started."""
    with bind("127.0.0.1:0") as taken_already:
        listen = f"127.0.0.1:{taken_already.getsockname()[1]}"
        edge = EdgeProcess(tmp_path, "127.0.0.1:9", workers=2, listen=listen)
        edge.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tidegate_edge", "--config", str(edge.path), stderr=asyncio.subprocess.PIPE
        )
        _, told = await edge.process.communicate()
        assert edge.process.returncode == 78
        assert f"can't listen on {listen}" in told.decode()
