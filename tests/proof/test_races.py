"""Races between an edge's session and admission: the services' own code, thousands of orders of events.

Each seed is one order: of the loop's ready callbacks, of delays on the wire, of what the actors do and when.
A failure names its race and seed: `.venv/bin/pytest tests/proof/test_races.py -k revoke --seed 1234`
runs that one alone, the same every time. `--slow` runs twenty times as many.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from unittest import mock

import pytest

from tests.proof.actors import Unaries, client, vanish
from tests.proof.world import ADMISSION, TTL, World, world
from tests.support.shuffle import ShuffleLoop, run
from tidegate_admission import stream
from tidegate_admission.ticket import LeaseEnd
from tidegate_edge.ticket import Phase

SEEDS = 200
"""Per race; about 200 a second."""
I1, I2 = "http://h:1", "http://h:2"

Race = Callable[[World], Awaitable[None]]
RACES: dict[str, tuple[Race, frozenset[LeaseEnd]]] = {}


def race(*ends: LeaseEnd) -> Callable[[Race], Race]:
    """Adds one to the list. Its leases may end in these ways, beside being released."""

    def add(played: Race) -> Race:
        RACES[played.__name__] = played, frozenset({LeaseEnd.RELEASED, *ends})
        return played

    return add


def moment(dice: random.Random) -> float:
    """Seconds around which things happen together: often exactly then, else a little later."""
    return 0.5 + dice.choice([0.0, 0.0, dice.random() * 0.003, dice.random() * 0.05])


@race()
async def grant_and_cancel(w: World) -> None:
    """The holder leaves while a waiter is cancelled."""
    await w.start(i1=I1)
    session, dice = await w.session(), w.dice
    holders = [client(w, session, hold=moment(dice)) for _ in range(2)]
    waiters = [client(w, session, leave=moment(dice), hold=dice.random()) for _ in range(dice.randint(1, 4))]
    await asyncio.wait([*holders, *waiters])


@race()
async def grant_and_deadline(w: World) -> None:
    """A slot becomes free when a waiter's own deadline passes."""
    await w.start(i1=I1)
    session, dice = await w.session(), w.dice
    holders = [client(w, session, hold=moment(dice)) for _ in range(2)]
    waiters = [client(w, session, deadline=moment(dice), hold=0.1) for _ in range(3)]
    await asyncio.wait([*holders, *waiters])


@race(LeaseEnd.INSTANCE_LOST)
async def done_and_lost(w: World) -> None:
    """The instance goes away as its holders end, and comes back."""
    await w.start(i1=I1)
    session, dice = await w.session(), w.dice
    clients = [client(w, session, hold=moment(dice)) for _ in range(5)]
    await asyncio.sleep(moment(dice))
    w.lifecycle.say()
    await asyncio.sleep(dice.random() * 0.2)
    w.lifecycle.say(i1=I1)
    await asyncio.wait(clients)


@race()
async def move_and_done(w: World) -> None:
    """A lease is moved and ends, while the grant after the move may be on its way."""
    await w.start(i1=I1, i2=I2)
    session, dice = await w.session(), w.dice
    clients = [
        client(w, session, hold=0.3, moves=dice.randint(0, 3), leave=moment(dice) + dice.random())
        for _ in range(7)
    ]
    await asyncio.wait(clients)


@race(LeaseEnd.INSTANCE_LOST)
async def move_and_lost(w: World) -> None:
    """A server dies: its leases are moved while supply says that it is gone. Who has moved doesn't notice."""
    await w.start(i1=I1, i2=I2)
    session, dice = await w.session(), w.dice
    clients = [client(w, session, hold=0.2, flees="i1", hold_before=moment(dice)) for _ in range(4)]
    await asyncio.sleep(moment(dice))
    w.lifecycle.say(i2=I2)
    await asyncio.wait(clients)
    assert {one.result() for one in clients} <= {"served", "lost INSTANCE_LOST as a holder"}


@race(LeaseEnd.RECLAIMED)
async def two_streams(w: World) -> None:
    """The stream breaks again and again; admission still reads the old one when the new one says Hello."""
    await w.start(i1=I1)
    dice = w.dice
    scale = dice.choice([0.0, 0.01, 0.5])
    w.network.linger = lambda: dice.random() * scale
    sessions = [await w.session() for _ in range(2)]
    clients = []
    for _ in range(4):
        clients += [client(w, dice.choice(sessions), hold=dice.random() * 0.3) for _ in range(3)]
        await asyncio.sleep(dice.random() * 0.3)
        w.network.cut(ADMISSION, "Session")
    await asyncio.wait(clients)


@race(LeaseEnd.REVOKED)
async def revoke_and_release(w: World) -> None:
    """An operator revokes leases as they end."""
    await w.start(i1=I1)
    session, dice = await w.session(), w.dice
    clients = [client(w, session, hold=moment(dice)) for _ in range(4)]
    await asyncio.sleep(moment(dice))
    for lease in [(session.session_id, n) for n in session.held]:
        w.dispatcher.revoke(lease, w.now())
    await asyncio.wait(clients)


@race()
async def goodbye_and_acquire(w: World) -> None:
    """An edge leaves while its requests come, wait and end; another one stays."""
    await w.start(i1=I1)
    leaver, stayer, dice = await w.session(), await w.session(), w.dice
    clients = [client(w, leaver, hold=moment(dice), leave=1.0) for _ in range(3)]
    clients += [client(w, stayer, hold=0.1) for _ in range(2)]
    await asyncio.sleep(moment(dice))
    closing = asyncio.create_task(leaver.close())
    w.left_alone.add(leaver)
    await asyncio.sleep(moment(dice) - 0.5)
    clients += [client(w, leaver, leave=0.3) for _ in range(2)]
    await asyncio.wait([closing, *clients])
    assert [one.result() for one in clients[3:5]] == ["served"] * 2


@race(LeaseEnd.RECLAIMED)
async def statement_and_grant(w: World) -> None:
    """Relays vanish without a word while others are granted: exactly those are taken back."""
    await w.start(i1=I1)
    session, dice = await w.session(), w.dice
    gone = 0
    clients = []
    for _ in range(3):
        clients += [client(w, session, hold=dice.random() * 0.3) for _ in range(2)]
        gone += await vanish(w, session)
        await asyncio.sleep(dice.random() * TTL / 3)
    await asyncio.wait(clients)
    await w.settled()
    assert w.reclaimed() == gone
    assert {one.result() for one in clients} == {"served"}


@race(LeaseEnd.EXPIRED)
async def unary_cancel_and_grant(w: World) -> None:
    """Unary calls are cancelled, with their connection or their deadline, as slots are granted to them."""
    await w.start(i1=I1)
    dice, calls = w.dice, Unaries(w)
    for i in range(2):
        calls.start(f"holder {i}", hold=moment(dice))
    for i in range(4):
        calls.start(f"waiter {i}", hold=dice.random() * 0.2, leave=moment(dice), timeout=moment(dice))
    await calls.over()


@race(LeaseEnd.EXPIRED)
async def unary_repeats(w: World) -> None:
    """Repeats of calls, some with short deadlines: one lease each, and none ends for another's deadline."""
    await w.start(i1=I1)
    dice, calls = w.dice, Unaries(w)
    for i in range(2):
        calls.start(f"holder {i}", hold=moment(dice))
    for _ in range(3):
        calls.start("asked thrice", hold=0.2, timeout=dice.choice([moment(dice), 0.3, 5.0]))
        await asyncio.sleep(dice.choice([0.0, dice.random() * 0.01]))
    patient = calls.start("asked thrice", hold=0.2, timeout=5.0)
    await calls.over()
    assert patient.result() == "served"


@race(LeaseEnd.RECLAIMED)
async def full_outbox(w: World) -> None:
    """The wire takes nothing for a while: the stream is closed, and opened again."""
    with (
        mock.patch.object(stream, "MAX_ANSWERS", 1),
        mock.patch.object(stream.Stream.__init__, "__defaults__", (6,)),
    ):
        await w.start(i1=I1)
        session, dice = await w.session(), w.dice
        usual, w.network.room = w.network.delay, 1
        w.network.delay = lambda: 0.2 + dice.random() * 0.3
        clients = [client(w, session, hold=dice.random() * 0.1) for _ in range(12)]
        await asyncio.sleep(0.5 + dice.random())
        w.network.delay = usual
        await asyncio.wait(clients)


@race(LeaseEnd.EXPIRED, LeaseEnd.RECLAIMED)
async def silence(w: World) -> None:
    """The wire dies without a word: leases expire, the edge opens a new stream and says what it holds."""
    await w.start(i1=I1)
    session, other, dice = await w.session(), await w.session(), w.dice
    clients = [client(w, session, hold=dice.random() * 2 * TTL) for _ in range(3)]
    await asyncio.sleep(dice.random() * 0.5)
    w.network.stick(ADMISSION)
    clients += [client(w, dice.choice([session, other]), hold=0.1) for _ in range(3)]
    await asyncio.wait(clients)


@race(LeaseEnd.RECLAIMED)
async def admission_restarts(w: World) -> None:
    """Admission dies in the middle, with leases and waiters on two edges: its books come back by Hello."""
    await w.start(i1=I1)
    dice = w.dice
    sessions = [await w.session() for _ in range(2)]
    clients = [client(w, dice.choice(sessions), hold=dice.random()) for _ in range(5)]
    await asyncio.sleep(moment(dice) - 0.4)
    w.kill_admission()
    await asyncio.sleep(dice.random() * 0.3)
    clients += [client(w, dice.choice(sessions), hold=0.1) for _ in range(2)]
    await asyncio.wait(clients)
    assert {one.result() for one in clients} <= {"served", "refused QUEUE_FULL"}


@race(*LeaseEnd)
async def everything(w: World) -> None:
    """All of it at once, in any order."""
    await w.start(i1=I1, i2=I2)
    dice, calls = w.dice, Unaries(w)
    sessions = [await w.session() for _ in range(2)]
    clients: list[asyncio.Task[str]] = []
    others: list[asyncio.Task[int]] = []
    for _ in range(14):
        session, what = dice.choice(sessions), dice.randrange(9)
        if what < 4:
            clients.append(
                client(
                    w,
                    session,
                    hold=dice.random() * 0.5,
                    moves=dice.choice([0, 0, 1, 2]),
                    leave=dice.choice([None, dice.random()]),
                    deadline=dice.choice([0.0, dice.random()]),
                )
            )
        elif what == 4:
            calls.start(
                f"r{dice.randrange(3)}", hold=0.1, timeout=1.0, leave=dice.choice([None, dice.random()])
            )
        elif what == 5:
            w.network.cut(ADMISSION, "Session")
        elif what == 6:
            w.lifecycle.say(**dice.choice([{"i1": I1}, {"i2": I2}, {"i1": I1, "i2": I2}, {}]))
        elif what == 7:
            others.append(asyncio.create_task(vanish(w, session)))
        elif session.held:
            w.dispatcher.revoke((session.session_id, min(session.held)), w.now())
        await asyncio.sleep(dice.choice([0.0, 0.0, dice.random() * 0.2]))
    w.lifecycle.say(i1=I1, i2=I2)
    others.append(asyncio.create_task(calls.over()))
    await asyncio.wait([*clients, *others])


async def _play(name: str) -> tuple[int, float]:
    played, ends = RACES[name]
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ShuffleLoop)
    dice = loop.dice
    scale = dice.choice([0.0, 0.0, 0.0005, 0.005, 0.05])
    async with world(slots=2, delay=lambda: dice.random() * scale, room=dice.choice([1, 8])) as w:

        def check() -> None:
            w.check()
            w.check_calls()

        loop.after_each = check
        await played(w)
        await w.settled()
        for session in w.sessions:
            if session not in w.left_alone:
                assert await client(w, session, hold=0.0) == "served", "the next request"
        await w.settled()
        assert {ticket.phase for ticket in w.tickets} <= {Phase.ENDED}, w.tickets
        assert not w.deaths, w.deaths
        assert w.lease_ends() <= ends
        loop.after_each = None
        return loop.steps, loop.time()


@pytest.mark.parametrize("name", RACES)
def test_no_order_of_events_leaks_anything(name: str, request: pytest.FixtureRequest) -> None:
    """Whatever order: the books agree at every step, each ticket ends once, all is free in the end."""
    given = request.config.getoption("--seed")
    seeds = [given] if given is not None else range(SEEDS * (20 if request.config.getoption("--slow") else 1))
    for seed in seeds:
        loop = ShuffleLoop(seed)
        try:
            run(loop, _play(name))
            assert not loop.errors, loop.errors
        except BaseException as error:
            raise AssertionError(f"{name} fails; run it alone with --seed {seed}: {error}") from error


def test_a_seed_is_the_same_run_every_time() -> None:
    """Steps and virtual time until all is free depend on nothing but the seed."""

    def played(seed: int) -> tuple[int, float]:
        return run(ShuffleLoop(seed), _play("everything"))

    for seed in range(20):
        assert played(seed) == played(seed)
    assert played(1) != played(2)
