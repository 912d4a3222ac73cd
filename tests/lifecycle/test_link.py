"""What lifecycle takes from a demand: last use, interest, what is seen, and when all that ends."""

from __future__ import annotations

import asyncio
import math

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.instance import Instance
from tidegate_lifecycle.link import Link, Stream

BOOT = 3


def report(
    *models: pb.ModelDemand, whole: bool = False, incarnation: int = 7, uptime: float = 10.0, seen: int = 1
) -> pb.DemandReport:
    """A settled demand."""
    return pb.DemandReport(
        admission_incarnation=incarnation,
        uptime_ms=int(uptime * 1000),
        whole=whole,
        settled=True,
        supply_seen=pb.Generation(incarnation=BOOT, n=seen),
        models=models,
        roster=["edge"],
    )


def use(leases: int, grants: int) -> pb.ModelDemand:
    """Model `a` with one instance in use."""
    one = pb.InstanceDemand(instance_id="a-1", leases=leases, grants=grants)
    return pb.ModelDemand(model="a", instances=[one])


async def linked(*models: pb.ModelDemand) -> tuple[Link, Stream, dict[str, Instance]]:
    """A link with an admission that said this at 100."""
    link, stream = Link(BOOT, []), Stream(asyncio.Event(), asyncio.Event())
    instances = {"a-1": Instance("a-1", "a", ("gpu0",), 1, 0.0, last_used=50.0)}
    assert link.take(stream, report(*models, whole=True), instances, 100.0)
    return link, stream, instances


async def test_either_count_shows_use() -> None:
    """A lease held, a lease that has ended, and grants whose leases began and ended between two reports."""
    link, stream, instances = await linked(use(0, 0))
    one = instances["a-1"]
    assert one.last_used == 50.0
    for now, leases, grants, used in (
        (110.0, 1, 1, 110.0),
        (120.0, 1, 1, 120.0),
        (130.0, 0, 1, 130.0),
        (140.0, 0, 1, 130.0),
        (150.0, 0, 9, 150.0),
        (160.0, 0, 9, 150.0),
    ):
        assert link.take(stream, report(use(leases, grants)), instances, now)
        assert (one.last_used, one.leases) == (used, leases)


async def test_a_new_admission_that_counts_from_nothing_is_no_use() -> None:
    """Its grants begin at 0; what it has granted by its first report is use."""
    link, _, instances = await linked(use(0, 9))
    one = instances["a-1"]
    newer = Stream(asyncio.Event(), asyncio.Event())
    assert link.take(newer, report(use(0, 0), whole=True, incarnation=8, uptime=1.0), instances, 200.0)
    assert one.last_used == 100.0
    newest = Stream(asyncio.Event(), asyncio.Event())
    assert link.take(newest, report(use(0, 2), whole=True, incarnation=9, uptime=1.0), instances, 300.0)
    assert one.last_used == 300.0


async def test_an_interest_lasts_as_told_and_ends_with_its_admission() -> None:
    """Until then, counted from the report; a later report, a new admission's whole one, or the end of the
    stream ends it."""
    interested = pb.ModelDemand(model="a", interest_ms=180_000)
    link, stream, instances = await linked(interested)
    assert link.demand["a"].interest_until == 280.0
    assert (link.demand["a"].waiting, link.demand["a"].oldest_since) == (0, math.inf)
    link.take(stream, report(pb.ModelDemand(model="b", waiting=1)), instances, 110.0)
    assert link.demand["a"].interest_until == 280.0, "a report about others changes nothing"
    link.take(stream, report(use(1, 1)), instances, 120.0)
    assert link.demand["a"].interest_until == 0.0
    link.take(stream, report(interested), instances, 130.0)
    newer = Stream(asyncio.Event(), asyncio.Event())
    link.take(newer, report(whole=True, incarnation=8, uptime=1.0), instances, 140.0)
    assert not link.demand
    link.take(newer, report(interested, incarnation=8), instances, 150.0)
    assert link.end(newer, 160.0, instances)
    assert not link.demand


async def test_what_is_seen_counts_of_this_boot_alone() -> None:
    """An acknowledgement of another boot's generation is none."""
    link, stream, instances = await linked()
    link.take(stream, report(seen=9), instances, 110.0)
    assert link.seen == 9
    other = report(seen=12)
    other.supply_seen.incarnation = BOOT + 1
    link.take(stream, other, instances, 120.0)
    assert link.seen == 0
