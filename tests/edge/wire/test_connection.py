"""One connection without a socket: turns of the loop that a real one takes only now and then."""

from __future__ import annotations

from tests.edge.wire.memory import Line, turns
from tests.edge.wire.raw import post
from tests.support.until import until
from tidegate_edge.downstream.server import Limits

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


async def test_a_request_that_comes_in_the_turn_of_an_answer_waits_for_its_own() -> None:
    """The loop may read the socket between an answer's end and the look at what has come before it. Two
    requests at once would mix their answers."""
    for pauses in range(6):
        line = Line()
        line.feed(GET + GET)
        await turns(pauses)
        line.feed(GET)
        await turns()
        assert len(line.app.heard) == 3
        assert not line.app.overlapped


async def test_what_is_no_request_behind_an_unanswered_one_waits_for_its_answer() -> None:
    """Its 400 comes behind the answer, not into it or instead of it."""
    for pauses in range(6):
        line = Line()
        line.feed(post() + GET + b"no")
        await turns(pauses)
        line.feed(b" request\r\n\r\n" + GET)
        await turns()
        statuses = [part[:3] for part in bytes(line.transport.written).split(b"HTTP/1.1 ")[1:]]
        assert statuses == [b"200", b"200", b"400"]


async def test_a_client_that_takes_no_answers_is_read_no_further() -> None:
    """What it goes on to send stays with it: it holds a head's length and one read of the socket."""
    line = Line(Limits(head=4096))
    line.transport.full = True
    line.connection.pause_writing()
    sent = 0
    while line.transport.reading and sent < 2**20:
        line.feed(GET * 100)
        sent += 100 * len(GET)
        await turns(2)
    assert sent <= 4096 + 200 * len(GET)
    line.transport.full, line.transport.held = False, 0
    line.connection.resume_writing()
    await until(lambda: len(line.app.heard) == sent // len(GET), "all are answered once it takes answers")
    assert line.transport.reading


async def test_a_connection_whose_answer_is_on_its_way_can_be_the_idle_one() -> None:
    """A transport sends at the end of a turn; an answer that is not even late is no reason to keep newcomers
    out."""
    line = Line(Limits(connections=1))
    line.transport.full = True  # until the end of this turn
    line.feed(GET)
    await turns()
    other = Line()
    other.connection.server = line.server
    assert line.server.welcome(other.connection)
    assert line.transport.closing


async def test_who_takes_a_part_is_given_time_for_the_rest() -> None:
    """Within write_timeout a client must take something of what waits for it, not all."""
    line = Line()
    line.transport.held = 100_000
    line.server.owes(line.connection)
    line.transport.held = 50_000
    line.connection.overdue()
    assert not line.transport.aborted
    line.connection.overdue()
    assert line.transport.aborted


async def test_who_is_slow_to_take_the_last_answer_is_not_hurried() -> None:
    """A moment's lingering is for a client that has taken everything and doesn't close."""
    line = Line()
    line.feed(b"no request\r\n\r\n")
    line.transport.held = 100
    line.connection.lingered()
    assert not line.transport.closing
    line.transport.held = 0
    line.connection.overdue()
    line.connection.lingered()
    assert line.transport.closing
    assert not line.transport.aborted
