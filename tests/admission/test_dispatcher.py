"""The dispatcher with a clock of the test's own: sessions, restarts, silence, gaps, supply and demand."""

from __future__ import annotations

import pytest

from tests.admission.support import READY, TTL, Desk, Recorder, instance, model, report
from tidegate_admission import views
from tidegate_admission.progress import FlowProgress
from tidegate_admission.session import Held, Hello, SupersededError, digest
from tidegate_admission.supply import InstanceState, SupplyBook
from tidegate_admission.ticket import Band, LeaseEnd, Outcome, Reason, Ticket, TicketEnd


def waiting(session: str, n: int, age: float = 0.0, moves: int = 0, excluded: str = "") -> Ticket:
    """A stated ticket; desks begin at 1000."""
    shut = frozenset({excluded} if excluded else ())
    return Ticket((session, n), "m", 1000.0 - age, moves=moves, excluded=shut)


def test_a_batch_is_granted_in_order_up_to_the_slots() -> None:
    """Three acquires on two slots: two grants, and the third when one is done."""
    desk = Desk()
    desk.supply(model(instance(slots=2)))
    session, outbox = desk.open()
    assert outbox.take() == [("welcome",)]
    desk.acquire(session, 1, 2, 3)
    assert outbox.take() == [("grant", 1, "i1", 0), ("grant", 2, "i1", 0)]
    desk.done(session, 1)
    assert outbox.take() == [("grant", 3, "i1", 0)]
    desk.check()


def test_a_burst_fills_free_slots_before_the_queue_bound_refuses() -> None:
    """With 2 slots and a queue of 1, a batch of 4 gets 2 grants, 1 place and 1 refusal."""
    desk = Desk(max_queue=1)
    desk.supply(model(instance(slots=2)))
    session, outbox = desk.open()
    desk.acquire(session, 1, 2, 3, 4)
    assert outbox.take("grant", "refuse") == [
        ("grant", 1, "i1", 0),
        ("grant", 2, "i1", 0),
        ("refuse", 4, Reason.QUEUE_FULL),
    ]
    desk.check()


def test_an_acquire_and_its_cancel_in_one_batch_leave_nothing() -> None:
    """Cancelled before the gates decide, a ticket is never granted."""
    desk = Desk()
    desk.supply(model(instance()))
    session, outbox = desk.open()
    outbox.take()
    desk.dispatcher.acquire(session, Ticket(("s", 1), "m", desk.now), desk.now)
    desk.dispatcher.done(session, 1, Outcome.CLIENT_GONE, desk.now)
    desk.dispatcher.settle(desk.now)
    assert outbox.take() == []
    assert desk.dispatcher.tallies["m"].ticket_ends[TicketEnd.CANCELLED] == 1
    desk.check()


def test_an_acquire_is_idempotent() -> None:
    """Repeated for a lease it is answered with the same grant, repeated for a ticket it changes nothing."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    session, outbox = desk.open()
    desk.acquire(session, 1, 2)
    outbox.take()
    desk.acquire(session, 1, 2)
    assert outbox.take() == [("grant", 1, "i1", 0)]
    assert len(session.leases) == len(session.tickets) == 1
    desk.check()


def test_the_end_of_an_unknown_id_is_counted_and_nothing_else() -> None:
    """A release that is repeated, or of an id that never was, is a no-op."""
    desk = Desk()
    desk.supply(model(instance()))
    session, _ = desk.open()
    desk.acquire(session, 1)
    desk.done(session, 1, 1, 77)
    desk.move(session, 1, "i1")
    assert desk.dispatcher.books.unknown_ids == 3
    desk.check()


def test_hello_tells_a_lost_grant_again() -> None:
    """A ticket that its edge states as waiting, and that was granted, is answered with the same grant."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    session, old = desk.open()
    desk.acquire(session, 1, 2)
    desk.dispatcher.stream_ended(session, old)
    _, fresh = desk.open(seq=2, waiting=(waiting("s", 1), waiting("s", 2)))
    assert fresh.take() == [("welcome",), ("grant", 1, "i1", 0)]
    assert old.closed is None or old.closed is Reason.SUPERSEDED
    desk.check()


def test_hello_ends_what_it_does_not_state() -> None:
    """A lease that is not stated is reclaimed, a ticket that is not stated is cancelled."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    session, _ = desk.open()
    desk.acquire(session, 1, 2, 3)
    _, outbox = desk.open(seq=2, waiting=(waiting("s", 3),))
    assert outbox.take() == [("welcome",), ("grant", 3, "i1", 0)]
    tally = desk.dispatcher.tallies["m"]
    assert tally.lease_ends[LeaseEnd.RECLAIMED] == 1
    assert tally.ticket_ends[TicketEnd.CANCELLED] == 1
    desk.check()


def test_hello_carries_out_a_move_whose_message_was_lost() -> None:
    """Stated as waiting with more moves than its lease had: the lease ends and the ticket goes elsewhere."""
    desk = Desk()
    desk.supply(model(instance("i1", 1), instance("i2", 1)))
    session, outbox = desk.open()
    desk.acquire(session, 1)
    first = str(outbox.take("grant")[0][2])
    _, outbox = desk.open(seq=2, waiting=(waiting("s", 1, moves=1, excluded=first),))
    second = "i2" if first == "i1" else "i1"
    assert outbox.take("grant") == [("grant", 1, second, 1)]
    desk.check()


def test_hello_of_an_older_stream_is_refused_and_of_a_newer_one_replaces() -> None:
    """The newest stream of a session is the one that counts."""
    desk = Desk()
    _, first = desk.open(seq=2)
    with pytest.raises(SupersededError):
        desk.open(seq=1)
    desk.open(seq=3)
    assert first.closed is Reason.SUPERSEDED


def test_a_lease_that_a_heartbeat_does_not_state_is_reclaimed() -> None:
    """A release that got lost: the digest differs, the full set is asked for, and the lease ends."""
    desk = Desk()
    desk.supply(model(instance(slots=3)))
    session, outbox = desk.open()
    desk.acquire(session, 1, 2, 3)
    outbox.take()
    desk.beat(session, 1, (1, 2, 3))
    assert outbox.take() == [("ack", 1)]
    desk.beat(session, 2, (1, 3))
    assert outbox.take() == [("ack", 2), ("query", 2)]
    held = [Held(1, "m", "i1"), Held(3, "m", "i1")]
    desk.dispatcher.statement(session, 1, 99, [], desk.now)  # not the one that was asked for
    assert sorted(session.leases) == [1, 2, 3]
    desk.dispatcher.statement(session, 2, 99, held, desk.now)
    assert sorted(session.leases) == [1, 3]
    assert desk.dispatcher.tallies["m"].lease_ends[LeaseEnd.RECLAIMED] == 1
    desk.check()


def test_a_grant_still_on_its_way_is_not_judged_by_a_heartbeat() -> None:
    """Leases of responses that the edge hadn't read when it made its statement are left out of account."""
    desk = Desk()
    desk.supply(model(instance(slots=3)))
    session, outbox = desk.open()
    desk.acquire(session, 1)
    seen = outbox.seq - 1
    desk.acquire(session, 2)
    outbox.take()
    desk.beat(session, 1, (1,), seen=seen)
    assert outbox.take() == [("ack", 1)]
    desk.beat(session, 2, (), seen=seen)
    desk.dispatcher.statement(session, 2, seen, [], desk.now)
    assert sorted(session.leases) == [2]
    desk.check()


def test_a_stated_lease_that_the_book_lacks_is_taken_again_where_a_slot_is_free() -> None:
    """After an expiry the edge gets its slot back if it is free, else it is told that it is lost."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    session, outbox = desk.open()
    for number, expected in ((1, []), (2, [("lost", 8, Reason.EXPIRED)])):
        outbox.take()
        desk.beat(session, number, (7, 8))
        held = [Held(7, "m", "i1"), Held(8, "m", "i1")]
        desk.dispatcher.statement(session, number, 99, held[:number], desk.now)
        assert outbox.take("lost") == expected
    assert sorted(session.leases) == [7]
    desk.check()


def test_a_silent_session_keeps_its_places_and_gets_no_grants() -> None:
    """After 1.5 heartbeats others are served before it; when it speaks again its ticket is first."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    lively, live = desk.open("lively")
    quiet, still = desk.open("quiet")
    desk.acquire(lively, 1)
    desk.acquire(quiet, 1, 2)
    desk.acquire(lively, 2, 3)
    desk.wait(4.0)
    desk.beat(lively, 1, (1,))
    desk.wait(1.5)
    still.take()
    desk.done(lively, 1)
    assert live.take("grant")[-1][1] == 2
    assert still.take() == []
    desk.beat(quiet, 1, ())
    desk.done(lively, 2)
    assert still.take("grant") == [("grant", 1, "i1", 0)]
    desk.check()


def test_a_dead_session_is_over_after_the_ttl() -> None:
    """Without stream and heartbeat, slots go to others within the ttl, and the session is forgotten."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    dead, gone = desk.open("dead")
    desk.acquire(dead, 1, 2)
    desk.dispatcher.stream_ended(dead, gone)
    desk.wait(6.0)
    live, outbox = desk.open("live")
    desk.acquire(live, 1)
    assert outbox.take("grant") == []
    desk.wait(TTL - 6.0)
    assert outbox.take("grant") == [("grant", 1, "i1", 0)]
    assert list(desk.dispatcher.sessions) == ["live"]
    tally = desk.dispatcher.tallies["m"]
    assert tally.lease_ends[LeaseEnd.EXPIRED] == 1
    assert tally.ticket_ends[TicketEnd.SESSION_LOST] == 1
    desk.check()


def test_an_expired_lease_is_taken_again_only_where_a_slot_is_free() -> None:
    """An edge that was away comes back with a new Hello: one of its two slots is somebody else's by now."""
    desk = Desk()
    desk.supply(model(instance(slots=2)))
    away, gone = desk.open("away")
    desk.acquire(away, 1, 2)
    desk.dispatcher.stream_ended(away, gone)
    desk.wait(6.0)
    live, outbox = desk.open("live")
    desk.acquire(live, 1)
    desk.wait(TTL - 6.0)
    assert outbox.take("grant") == [("grant", 1, "i1", 0)]
    back, told = desk.open("away", 2, held=(Held(1, "m", "i1"), Held(2, "m", "i1")))
    assert told.take("lost") == [("lost", 2, Reason.EXPIRED)]
    assert list(back.leases) == [1]
    desk.check()


def test_a_stopped_edge_is_told_what_it_lost_and_goes_on() -> None:
    """A session that is silent for the ttl with its stream open gets its losses, and may acquire again."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    session, outbox = desk.open()
    desk.acquire(session, 1, 2)
    outbox.take()
    desk.wait(TTL)
    assert outbox.take() == [("lost", 1, Reason.EXPIRED), ("refuse", 2, Reason.EXPIRED)]
    desk.beat(session, 1, ())
    desk.acquire(session, 3)
    assert outbox.take("grant") == [("grant", 3, "i1", 0)]
    desk.check()


def test_a_gap_of_the_own_loop_expires_nobody() -> None:
    """Shifted by the gap, sessions have as much time left as before it."""
    desk = Desk(queue_timeout=20.0)
    desk.supply(model(instance(slots=1)))
    session, _ = desk.open()
    desk.acquire(session, 1, 2)
    desk.now += 60.0
    desk.dispatcher.shift(60.0, desk.now)
    desk.wait(0.1)
    assert sorted(session.leases) == [1]
    assert sorted(session.tickets) == [2]
    desk.wait(TTL)
    assert not session.leases
    desk.check()


def test_what_is_heard_before_a_gap_is_noticed_lives_no_longer_for_it() -> None:
    """After a freeze a Hello may be read before the timer sees the gap: its session's time runs from then."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    desk.now += 60.0
    session, _ = desk.open()
    desk.acquire(session, 1)
    desk.dispatcher.shift(60.0, desk.now)
    desk.wait(TTL)
    assert not session.leases
    desk.check()


def test_goodbye_ends_everything_at_once() -> None:
    """An edge that leaves frees its slots without waiting for the ttl."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    leaver, _ = desk.open("leaver")
    other, outbox = desk.open("other")
    desk.acquire(leaver, 1, 2)
    desk.acquire(other, 1)
    desk.dispatcher.goodbye(leaver, desk.now)
    assert outbox.take("grant") == [("grant", 1, "i1", 0)]
    assert list(desk.dispatcher.sessions) == ["other"]
    desk.check()


def test_a_restarted_admission_grants_nothing_on_old_instances_before_the_roster_has_spoken() -> None:
    """Rostered sessions are waited for; a restated lease takes its slot, and only what is left is granted."""
    desk = Desk()
    desk.supply(model(instance(slots=2, old=True)), roster=("a", "b"))
    first, outbox = desk.open("a")
    desk.acquire(first, 1, 2)
    assert outbox.take("grant") == []
    assert not desk.dispatcher.demand(True, desk.now).settled
    desk.open("b", held=(Held(9, "m", "i1", age=5.0),))
    assert outbox.take("grant") == [("grant", 1, "i1", 0)]
    assert desk.dispatcher.demand(True, desk.now).settled
    assert desk.dispatcher.tallies["m"].restated == 1
    desk.check()


def test_the_restart_window_closes_after_the_ttl_at_the_latest() -> None:
    """A rostered session that never comes holds nobody up for longer than its leases could live."""
    desk = Desk()
    desk.supply(model(instance(slots=1, old=True)), roster=("gone",))
    session, outbox = desk.open("a")
    desk.acquire(session, 1)
    desk.wait(4.0)
    desk.beat(session, 1, ())
    desk.wait(4.0)
    desk.beat(session, 2, ())
    assert outbox.take("grant") == []
    desk.wait(2.0)
    assert outbox.take("grant") == [("grant", 1, "i1", 0)]


def test_without_a_roster_old_instances_are_full_and_young_ones_empty() -> None:
    """Instances started after this process hold nobody else's leases, so a first boot waits for nothing."""
    desk = Desk()
    desk.supply(model(instance("old", 1, old=True), instance("young", 1)))
    session, outbox = desk.open()
    desk.acquire(session, 1, 2)
    assert outbox.take("grant") == [("grant", 1, "young", 0)]
    assert not desk.dispatcher.books.window.over
    first_boot = Desk()
    first_boot.supply(model(instance()))
    assert first_boot.dispatcher.books.window.over


def test_restated_leases_count_above_the_slots() -> None:
    """Facts are facts: three leases on two slots, and no grant before two of them have ended."""
    desk = Desk()
    held = tuple(Held(n, "m", "i1") for n in (1, 2, 3))
    session, outbox = desk.open(held=held, waiting=(waiting("s", 4, age=3.0),))
    desk.supply(model(instance(slots=2)))
    assert outbox.take("grant", "lost") == []
    desk.done(session, 1)
    assert outbox.take("grant") == []
    desk.done(session, 2)
    assert outbox.take("grant") == [("grant", 4, "i1", 0)]
    desk.check()


def test_a_restated_ticket_keeps_its_place_by_age() -> None:
    """Older restated tickets come before those that arrived here, above the queue's bound if need be."""
    desk = Desk(max_queue=1)
    first, outbox = desk.open("first")
    desk.acquire(first, 1)
    _, other = desk.open("other", waiting=(waiting("other", 1, age=30.0), waiting("other", 2, age=20.0)))
    desk.supply(model(instance(slots=2)))
    assert other.take("grant") == [("grant", 1, "i1", 0), ("grant", 2, "i1", 0)]
    assert outbox.take("grant") == []
    desk.check()


def test_a_draining_instance_gets_no_grants_and_its_last_end_is_urgent() -> None:
    """Demand is told at once when the drain has been seen and when its last lease has ended."""
    desk = Desk()
    desk.supply(model(instance(slots=2)))
    session, outbox = desk.open()
    desk.acquire(session, 1)
    outbox.take()
    desk.urgent.clear()
    desk.supply(model(instance(slots=2, state=InstanceState.DRAINING)), n=2, whole=False)
    assert True in desk.urgent
    desk.acquire(session, 2)
    assert outbox.take("grant") == []
    demand = desk.dispatcher.demand(False, desk.now)
    assert demand.supply_seen == (1, 2)
    assert demand.models[0].instances[0].leases == 1
    desk.urgent.clear()
    desk.done(session, 1)
    assert desk.urgent == [True]
    assert desk.dispatcher.demand(False, desk.now).models[0].instances[0].leases == 0
    desk.check()


def test_the_first_waiter_of_a_model_is_urgent_and_later_ones_are_not() -> None:
    """Lifecycle hears at once that a model is wanted, and of more waiters when it is convenient."""
    desk = Desk()
    desk.supply(model())
    session, _ = desk.open()
    desk.acquire(session, 1)
    assert desk.urgent[-1] is True
    assert desk.dispatcher.demand(False, desk.now).models[0].waiting == 1
    desk.acquire(session, 2)
    assert desk.urgent[-1] is False
    desk.urgent.clear()
    for _ in range(20):
        desk.wait(0.05)
    assert desk.urgent == [], "waiting alone is no news"


def test_an_unsettled_lifecycle_only_adds() -> None:
    """What the last settled supply named stays, and grants go on, until a settled one leaves it out."""
    desk = Desk()
    desk.supply(model(instance(slots=2)))
    session, outbox = desk.open()
    desk.acquire(session, 1)
    outbox.take()
    desk.supply(settled=False, n=2)
    desk.acquire(session, 2)
    assert outbox.take() == [("grant", 2, "i1", 0)]
    desk.supply(model(), n=3)
    assert sorted(outbox.take()) == [("lost", 1, Reason.INSTANCE_LOST), ("lost", 2, Reason.INSTANCE_LOST)]
    desk.check()


def test_the_first_settled_report_counts_as_it_stands() -> None:
    """A changed-models report that settles drops what this lifecycle never named."""
    book = SupplyBook()
    book.take(report(model(instance(), name="a"), model(instance("i2"), name="b")))
    book.take(report(model(instance(), name="a"), settled=False, n=1))
    assert set(book.view) == {"a", "b"}
    affected = book.take(report(whole=False, n=2))
    assert set(book.view) == {"a"}
    assert affected >= {"b"}
    assert book.gone("b", "i2")
    assert not book.gone("a", "i1")


def test_a_ticket_of_a_newer_catalogue_waits_for_supply_to_catch_up() -> None:
    """A model that the edge knows and supply not yet is waited for; then it is served, or not found."""
    desk = Desk()
    desk.supply(catalog=1)
    session, outbox = desk.open()
    desk.acquire(session, 1, catalog=(1, 2))
    desk.acquire(session, 2, catalog=(1, 2), model="never")
    desk.acquire(session, 3, catalog=(1, 1), model="never")
    assert outbox.take("grant", "refuse") == [("refuse", 3, Reason.MODEL_NOT_FOUND)]
    desk.supply(model(instance()), catalog=2, n=2)
    assert sorted(outbox.take("grant", "refuse")) == [
        ("grant", 1, "i1", 0),
        ("refuse", 2, Reason.MODEL_NOT_FOUND),
    ]
    desk.check()


def test_a_model_of_which_nothing_changed_takes_part_in_a_newer_catalogue() -> None:
    """A report that only raises the catalogue's generation frees all the tickets that waited for it."""
    desk = Desk()
    desk.supply(model(instance()), catalog=1)
    session, outbox = desk.open()
    desk.supply(catalog=2, n=2, whole=False)
    desk.acquire(session, 1, catalog=(1, 2))
    assert outbox.take("grant") == [("grant", 1, "i1", 0)]


def test_without_lifecycle_tickets_are_refused_after_a_while() -> None:
    """Ten seconds after start without any supply, waiting and new tickets are told so."""
    desk = Desk()
    session, outbox = desk.open()
    desk.acquire(session, 1, catalog=(1, 2))
    desk.wait(4.0)
    desk.beat(session, 1, ())
    desk.wait(4.0)
    desk.beat(session, 2, ())
    assert outbox.take("refuse") == []
    desk.wait(2.0)
    assert outbox.take("refuse") == [("refuse", 1, Reason.UNAVAILABLE)]
    desk.acquire(session, 2, catalog=(1, 2))
    assert outbox.take("refuse") == [("refuse", 2, Reason.UNAVAILABLE)]
    desk.supply(model(instance()), catalog=2)
    desk.acquire(session, 3, catalog=(1, 2))
    assert outbox.take("grant") == [("grant", 3, "i1", 0)]
    desk.check()


def test_a_revoked_lease_stays_revoked() -> None:
    """Its holder is told, and can't bring it back by stating it."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    session, outbox = desk.open()
    desk.acquire(session, 1, 2)
    outbox.take()
    assert desk.dispatcher.revoke(("s", 1), desk.now)
    assert not desk.dispatcher.revoke(("s", 1), desk.now)
    assert outbox.take() == [("lost", 1, Reason.REVOKED), ("grant", 2, "i1", 0)] or outbox
    _, again = desk.open(seq=2, held=(Held(1, "m", "i1"), Held(2, "m", "i1")))
    assert again.take() == [("welcome",), ("lost", 1, Reason.REVOKED)]
    desk.check()


def test_a_lease_on_an_instance_that_is_gone_is_lost() -> None:
    """Stated after a settled supply without its instance, a lease is not restated."""
    desk = Desk()
    desk.supply(model(instance("new")))
    _, outbox = desk.open(held=(Held(1, "m", "i-gone"), Held(2, "nosuch", "i1")))
    assert outbox.take("lost") == [("lost", 1, Reason.INSTANCE_LOST), ("lost", 2, Reason.INSTANCE_LOST)]
    desk.check()


def test_idle_models_leave_no_state_and_made_up_names_share_one_record() -> None:
    """A gate without instances, tickets and leases is dropped; unknown names don't add records."""
    desk = Desk()
    desk.supply(model(instance()))
    session, _ = desk.open()
    for n in range(1, 50):
        desk.acquire(session, n, model=f"made-up-{n}")
    assert list(desk.dispatcher.gates) == ["m"]
    assert set(desk.dispatcher.tallies) == {"", "m"}
    desk.supply(model(), n=2)
    assert desk.dispatcher.gates == {}
    desk.check()


def test_the_roster_names_sessions_in_use_and_their_leases() -> None:
    """A session comes onto the roster at once with its first ticket, and leaves it a ttl after its last."""
    desk = Desk()
    desk.supply(model(instance()))
    session, _ = desk.open()
    assert desk.dispatcher.demand(True, desk.now).roster == ()
    desk.urgent.clear()
    desk.acquire(session, 1)
    assert desk.urgent == [True]
    assert desk.dispatcher.demand(False, desk.now).roster == ("s",)
    desk.done(session, 1)
    for number in range(1, 6):
        desk.wait(TTL / 4)
        desk.beat(session, number, ())
    assert desk.dispatcher.demand(False, desk.now).roster == ()


def test_progress_tells_each_session_its_head_once_a_second() -> None:
    """Sessions that asked hear where their first ticket of a flow stands, and whether the model loads."""
    desk = Desk()
    desk.supply(model(instance(state=InstanceState.STARTING), start_deadline=60.0))
    first, one = desk.open("one")
    second, two = desk.open("two")
    desk.acquire(first, 1)
    desk.acquire(second, 1, 2, wants_progress=True)
    desk.wait(1.0)
    desk.wait(0.5)
    flow = FlowProgress("m", "", (Band.HIGH, Band.NORMAL), 2, 1.0, 0.0, None, True)
    assert two.take("progress") == [("progress", flow)]
    assert one.take("progress") == []


def test_views_show_sets_as_numbers() -> None:
    """Queues, sessions and leases for operators are sizes and members of the sets."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    session, outbox = desk.open()
    desk.acquire(session, 1, 2)
    desk.wait(2.0)
    (gate,) = views.queues(desk.dispatcher, desk.now)
    assert (gate.queue.waiting, gate.queue.active, gate.oldest_wait) == (1, 1, 2.0)
    (one,) = views.sessions(desk.dispatcher, desk.now)
    assert (one.waiting, one.active, one.connected, one.silent) == (1, 1, True, 2.0)
    assert [ticket.id for _, ticket in views.leases(desk.dispatcher, "m", "s")] == [("s", 1)]
    assert views.leases(desk.dispatcher, "other") == []
    desk.move(session, 1, "i1")
    (gate,) = views.queues(desk.dispatcher, desk.now)
    assert (gate.instances[0].effective, bool(gate.instances[0].held_back)) == (0, True)
    assert isinstance(outbox, Recorder)


def test_the_digest_is_the_agreed_one() -> None:
    """Both sides of the wire compute the same: splitmix64 of 0 and 1 as published, summed modulo 2^64."""
    assert digest([]) == (0, 0)
    assert digest([0]) == (1, 0xE220A8397B1DCDAF)
    assert digest([0, 0x9E3779B97F4A7C15]) == (2, (0xE220A8397B1DCDAF + 0x6E789E6AA1B965F4) % 2**64)
    assert READY == 2
    assert Hello("s", 1, "h").held == ()
