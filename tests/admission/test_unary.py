"""Unary holders in this process: the calls, the book and a clock of the test's own, race by race."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from tests.admission.support import READY, TTL, Desk, Recorder, instance, model
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_admission import views
from tidegate_admission.fairness import TenantRule, Tenants
from tidegate_admission.holder import Holder
from tidegate_admission.session import Hello, SupersededError
from tidegate_admission.ticket import LeaseEnd, Reason, TicketEnd
from tidegate_admission.unary import CODES, Unary
from tidegate_chassis.errors import Refused


class Client:
    """A unary client over a dispatcher with the test's clock."""

    def __init__(self, slots: int = 1, restarted: bool = False, tenants: Tenants | None = None) -> None:
        self.desk = Desk(tenants=tenants)
        self.fatal: list[Exception] = []
        self.unary = Unary(self.desk.dispatcher, lambda: self.desk.now, self.fatal.append)
        old = instance("i1", slots, READY, restarted)
        self.desk.supply(model(old), roster=("h",) if restarted else None)

    def start(
        self, request_id: str, name: str = "m", seconds: float | None = None
    ) -> asyncio.Task[pb.AcquireResponse]:
        """A call that begins now."""
        request = pb.AcquireRequest(holder_id="h", request_id=request_id, model=name)
        return asyncio.create_task(self.unary.acquire(request, seconds, "test", ""))

    async def acquire(self, request_id: str, name: str = "m") -> str:
        """The id of a lease that is granted at once."""
        async with asyncio.timeout(5):
            return (await self.start(request_id, name)).lease_id

    def renew(self, lease_id: str, tenant: str = "") -> int:
        """Renews a lease on the only instance; its time to live in ms."""
        request = pb.RenewRequest(
            holder_id="h", lease_id=lease_id, model="m", instance_id="i1", tenant=tenant
        )
        return self.unary.renew(request).lease_ttl_ms

    def release(self, lease_id: str) -> bool:
        """Whether there was something to release."""
        return self.unary.release(pb.ReleaseRequest(holder_id="h", lease_id=lease_id)).known

    def counts(self) -> tuple[int, int]:
        """(waiting, active), with the books checked."""
        self.desk.check()
        gate = self.desk.dispatcher.gates.get("m")
        return (len(gate.waiting), gate.active) if gate else (0, 0)


async def turn() -> None:
    """Lets every task run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


def refusal(error: pytest.ExceptionInfo[Refused]) -> tuple[grpc.StatusCode, str]:
    """Code and reason."""
    return error.value.code, error.value.reason


async def test_a_slot_is_acquired_and_released() -> None:
    """A lease stands in the book like an edge's, and its release gives the slot to the next."""
    client = Client()
    lease = await client.acquire("one")
    second = client.start("two")
    await turn()
    assert client.counts() == (1, 1)
    (found,) = views.leases(client.desk.dispatcher)
    assert f"{found[0].id}/{found[1].id[1]}" == lease
    assert client.release(lease)
    assert (await second).lease_id != lease
    assert not client.release(lease), "released already"
    assert client.desk.dispatcher.books.unknown_ids == 1
    assert client.counts() == (0, 1)


async def test_repeats_of_an_acquire_are_one_lease() -> None:
    """Two calls with one id at the same time, and a third after the answer was lost: one slot, one lease."""
    client = Client(slots=2)
    calls = await asyncio.gather(client.start("one"), client.start("one"))
    assert {call.lease_id for call in calls} == {await client.acquire("one")}
    assert client.counts() == (0, 1)
    with pytest.raises(Refused) as other:
        await client.acquire("one", "another-model")
    assert refusal(other) == (grpc.StatusCode.INVALID_ARGUMENT, "REASON_INVALID")


async def test_one_of_two_waiting_repeats_may_go() -> None:
    """A repeat that is cancelled leaves the ticket to the other; with the last one the ticket ends."""
    client = Client()
    first = await client.acquire("first")
    one, two = client.start("x"), client.start("x")
    await turn()
    assert client.counts() == (1, 1)
    one.cancel()
    await turn()
    assert client.counts() == (1, 1)
    client.release(first)
    lease = (await two).lease_id
    assert client.counts() == (0, 1)
    three = client.start("y")
    await turn()
    three.cancel()
    await turn()
    assert client.counts() == (0, 1)
    assert client.desk.dispatcher.tallies["m"].ticket_ends[TicketEnd.CANCELLED] == 1
    assert client.release(lease)


async def test_a_grant_that_comes_with_the_cancel_goes_back_at_once() -> None:
    """Granted and cancelled before the call could take it: the slot is free, and the id may be used again."""
    client = Client()
    first = await client.acquire("first")
    late = client.start("late")
    await turn()
    client.release(first)  # grants to `late`, which hasn't run yet
    assert client.counts() == (0, 1)
    late.cancel()
    await turn()
    assert late.cancelled()
    assert client.counts() == (0, 0)
    await client.acquire("late")
    assert client.counts() == (0, 1)


async def test_a_grant_that_another_repeat_took_stays() -> None:
    """Of two calls that were granted the same lease one takes it; the other's cancel doesn't end it."""
    client = Client()
    first = await client.acquire("first")
    one, two = client.start("x"), client.start("x")
    await turn()
    client.release(first)
    two.cancel()
    lease = (await one).lease_id
    await turn()
    assert client.counts() == (0, 1)
    assert client.renew(lease) == TTL * 1000


async def test_a_lease_ends_a_ttl_after_its_last_renewal() -> None:
    """Each lease for itself; the late renewal is told why there is nothing left."""
    client = Client(slots=2)
    kept, left = await client.acquire("kept"), await client.acquire("left")
    client.desk.wait(TTL * 0.6)
    assert client.renew(kept) == TTL * 1000
    client.desk.wait(TTL * 0.6)
    assert client.counts() == (0, 1)
    assert client.desk.dispatcher.tallies["m"].lease_ends[LeaseEnd.EXPIRED] == 1
    client.renew(kept)
    with pytest.raises(Refused) as gone:
        client.renew(left)
    assert refusal(gone) == (grpc.StatusCode.NOT_FOUND, "REASON_EXPIRED")
    with pytest.raises(Refused) as again:
        await client.acquire("left")
    assert refusal(again) == (grpc.StatusCode.NOT_FOUND, "REASON_EXPIRED")


async def test_a_gap_of_the_loop_shifts_unary_leases_too() -> None:
    """Renewals couldn't be heard while the process stood still."""
    client = Client()
    lease = await client.acquire("one")
    client.desk.now += 3 * TTL
    client.desk.dispatcher.shift(3 * TTL, client.desk.now)
    client.desk.wait(0.05)
    assert client.renew(lease)
    assert client.counts() == (0, 1)
    client.desk.dispatcher.shift(3 * TTL, client.desk.now)  # renewed in time: a gap before that adds nothing
    client.desk.wait(TTL)
    assert client.counts() == (0, 0)


async def test_a_restated_lease_is_its_tenants_and_its_tokens_are_paid_by_nobody() -> None:
    """The admission before had reserved them; the renewal says whose lease it is."""
    client = Client()
    lease = await client.acquire("one")
    after = Client(restarted=True, tenants=Tenants(named={"team": TenantRule(tokens=600)}))
    after.renew(lease, "team")
    ((_, found),) = views.leases(after.desk.dispatcher)
    assert found.tenant == "team"
    before = views.tenants(after.desk.dispatcher, after.desk.now)
    release = pb.ReleaseRequest(holder_id="h", lease_id=lease, prompt_tokens=500, completion_tokens=500)
    assert after.unary.release(release).known
    assert views.tenants(after.desk.dispatcher, after.desk.now) == before
    assert after.counts() == (0, 0)


async def test_a_revoked_lease_is_told_at_the_next_renewal() -> None:
    """NOT_FOUND with the reason REVOKED; the slot is free at once."""
    client = Client()
    lease = await client.acquire("one")
    holder, _, n = lease.rpartition("/")
    assert client.desk.dispatcher.revoke((holder, int(n)), client.desk.now)
    assert client.counts() == (0, 0)
    with pytest.raises(Refused) as gone:
        client.renew(lease)
    assert refusal(gone) == (grpc.StatusCode.NOT_FOUND, "REASON_REVOKED")
    assert not client.release(lease)


async def test_a_lease_whose_instance_is_gone_is_lost() -> None:
    """By a settled supply; the next renewal says so."""
    client = Client()
    lease = await client.acquire("one")
    client.desk.supply(model(instance("i2")), n=2)
    with pytest.raises(Refused) as gone:
        client.renew(lease)
    assert refusal(gone) == (grpc.StatusCode.NOT_FOUND, "REASON_INSTANCE_LOST")
    client.desk.check()


async def test_a_renewal_restates_a_lease_while_the_restart_window_is_open() -> None:
    """It counts as a fact, also for a repeat of its acquire; when the window has closed it is too late."""
    before, after = Client(), Client(restarted=True)
    lease = await before.acquire("one")
    assert after.counts() == (0, 0)
    assert after.renew(lease) == TTL * 1000
    assert after.counts() == (0, 1)
    assert await after.acquire("one") == lease
    assert after.desk.dispatcher.demand(True, after.desk.now).roster == ("h",)
    waiter = after.start("two")
    await turn()
    after.desk.wait(TTL * 0.9)
    after.renew(lease)
    after.desk.wait(TTL * 0.2)
    assert after.counts() == (1, 1)
    with pytest.raises(Refused) as late:
        after.renew("h/77")
    assert refusal(late) == (grpc.StatusCode.NOT_FOUND, "REASON_EXPIRED")
    after.release(lease)
    assert (await waiter).instance_id == "i1"


async def test_refusals_carry_reason_and_code() -> None:
    """An unknown name, a queue that is full, a deadline that passes: each with its own status."""
    client = Client()
    with pytest.raises(Refused) as unknown:
        await client.acquire("one", "nobody")
    assert refusal(unknown) == (grpc.StatusCode.NOT_FOUND, "REASON_MODEL_NOT_FOUND")
    await client.acquire("two")
    short = client.start("three", seconds=2.0)
    await turn()
    client.desk.wait(2.1)
    with pytest.raises(Refused) as deadline:
        await short
    assert refusal(deadline) == (grpc.StatusCode.DEADLINE_EXCEEDED, "REASON_DEADLINE_EXCEEDED")
    calls = [client.start(f"n{i}") for i in range(201)]
    await turn()
    with pytest.raises(Refused) as full:
        await calls[200]
    assert refusal(full) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REASON_QUEUE_FULL")
    assert full.value.retry_after >= 1
    client.unary.close(Reason.DRAINING)
    ends = await asyncio.gather(*calls[:200], return_exceptions=True)
    assert {getattr(end, "reason", "") for end in ends} == {"REASON_DRAINING"}
    with pytest.raises(Refused):
        await client.start("later")
    assert set(CODES) == set(Reason)


async def test_holders_and_edges_keep_apart() -> None:
    """Neither can take the other's id, nor end the other's leases."""
    client = Client(slots=2)
    lease = await client.acquire("one")
    with pytest.raises(SupersededError):
        client.desk.dispatcher.hello(Recorder(), Hello("h", 1, "edge"), client.desk.now)
    session, _ = client.desk.open("e")
    client.desk.acquire(session, 1)
    for call in (
        lambda: client.unary.release(pb.ReleaseRequest(holder_id="e", lease_id="e/1")),
        lambda: client.unary.release(pb.ReleaseRequest(holder_id="e", lease_id=lease)),
        lambda: client.renew("e/1"),
        lambda: client.renew("h/x"),
    ):
        with pytest.raises(Refused) as invalid:
            call()
        assert refusal(invalid) == (grpc.StatusCode.INVALID_ARGUMENT, "REASON_INVALID")
    assert client.counts() == (0, 2)


async def test_a_holder_that_has_nothing_left_is_forgotten() -> None:
    """After a while nothing of it stays: no session, no place in the roster."""
    client = Client()
    client.release(await client.acquire("one"))
    assert isinstance(client.desk.dispatcher.sessions["h"], Holder)
    assert client.desk.dispatcher.demand(True, client.desk.now).roster == ("h",)
    for _ in range(13):
        client.desk.wait(TTL / 2)
    assert not client.desk.dispatcher.sessions
    assert client.desk.dispatcher.demand(True, client.desk.now).roster == ()


@pytest.mark.parametrize("seed", range(60))
async def test_random_calls_leave_nothing(seed: int) -> None:
    """Acquires, repeats, cancels, renewals, releases, losses and time in any order: in the end all is free.

    After every step the books agree, no more is held than there are slots, and no id has two leases.
    """
    dice, client = random.Random(seed), Client(slots=3)
    calls: list[asyncio.Task[pb.AcquireResponse]] = []
    held: set[str] = set()
    for step in range(150):
        what = dice.random()
        if what < 0.35:
            calls.append(
                client.start(f"r{dice.randrange(step // 2 + 1)}", seconds=dice.choice([None, 3.0, 30.0]))
            )
        elif what < 0.55 and calls:
            dice.choice(calls).cancel()
        elif what < 0.75 and held:
            client.release(held.pop())
        elif what < 0.8 and held:
            holder, _, n = dice.choice(sorted(held)).rpartition("/")
            client.desk.dispatcher.revoke((holder, int(n)), client.desk.now)
        elif what < 0.9:
            client.desk.wait(dice.choice([0.05, 1.0, TTL / 2]))
        else:
            for _ in range(dice.randrange(5)):
                await asyncio.sleep(0)
        for call in [call for call in calls if call.done()]:
            calls.remove(call)
            if not call.cancelled() and call.exception() is None:
                held.add(call.result().lease_id)
        waiting, active = client.counts()
        assert active <= 3, f"seed {seed}, step {step}"
        assert waiting <= len(calls), f"seed {seed}, step {step}: a ticket that nobody waits for"
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert client.counts()[0] == 0
    client.desk.wait(TTL + 1)
    assert client.counts() == (0, 0)
    assert not client.fatal


async def test_repeats_wait_until_the_latest_of_their_deadlines() -> None:
    """A repeat with more time puts the ticket's end off; one with less doesn't bring it forward."""
    client = Client()
    await client.acquire("holder")
    calls = [client.start("x", seconds=seconds) for seconds in (2.0, 5.0, 3.0)]
    await turn()
    client.desk.wait(2.5)
    assert client.counts() == (1, 1)
    client.desk.wait(2.0)
    assert client.counts() == (1, 1)
    client.desk.wait(1.0)
    assert client.counts() == (0, 1)
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert {getattr(end, "reason", "") for end in ends} == {"REASON_DEADLINE_EXCEEDED"}
