"""The session's messages: what they mean to the dispatcher, and how answers are written.

The hot path of the service. Answers are written straight into the response that goes out next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import grpc

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_admission.affinity import MAX_AFFINITY
from tidegate_admission.dispatcher import UNKNOWN, Dispatcher
from tidegate_admission.fairness import DEFAULT_TENANT
from tidegate_admission.rates import Allowance, RateState, Used
from tidegate_admission.session import Held, Hello, Session
from tidegate_admission.ticket import Band, Outcome, Ticket
from tidegate_chassis.errors import Refused

MAX_SESSION_ID = 64
MAX_TENANT = 64
"""Characters of a tenant's name."""
MAX_STATED = 200_000
"""Ids in one Hello or statement: far more than an edge has connections."""


def invalid(message: str) -> Refused:
    """The session breaks the contract."""
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, "REASON_INVALID", message)


class HelloParts:
    """Collects a Hello that comes in parts; nothing of it counts before the last one."""

    def __init__(self) -> None:
        self._first: pb.Hello | None = None
        self._held: list[Held] = []
        self._waiting: list[Ticket] = []
        self._same: dict[object, Any] = {}
        """What equals it in other tickets: 100,000 names of their own would fill the memory."""

    def add(self, part: pb.Hello, now: float) -> Hello | None:
        """Takes a part in; gives the whole with the last one. Raises Refused for a part that doesn't fit."""
        first = self._first = self._first or part
        if not 0 < len(part.session_id) <= MAX_SESSION_ID or part.stream_seq == 0:
            raise invalid(f"a Hello needs a session_id of 1 to {MAX_SESSION_ID} characters and a stream_seq")
        if (part.session_id, part.stream_seq) != (first.session_id, first.stream_seq):
            raise invalid("all parts of a Hello must be of one session and one stream")
        self._held += held(part.held)
        self._waiting += [self._restated(part.session_id, item, now) for item in part.waiting]
        if len(self._held) + len(self._waiting) > MAX_STATED:
            raise invalid(f"a Hello may state at most {MAX_STATED} ids")
        if not part.last:
            return None
        leases, tickets = tuple(self._held), tuple(self._waiting)
        self._held, self._waiting = [], []  # these parts live as long as the stream
        return Hello(part.session_id, part.stream_seq, first.holder, leases, tickets)

    def _restated(self, session_id: str, item: pb.WaitingTicket, now: float) -> Ticket:
        ticket, same = _ticket(session_id, item.acquire, now), self._same
        ticket.model = same.setdefault(ticket.model, ticket.model)
        ticket.tenant = same.setdefault(ticket.tenant, ticket.tenant)
        ticket.catalog = same.setdefault(ticket.catalog, ticket.catalog)
        ticket.arrived = now - item.age_ms / 1000
        ticket.moves = item.moves
        if item.excluded_instance_ids:
            ticket.excluded = frozenset(item.excluded_instance_ids)
        return ticket


def operations(dispatcher: Dispatcher, session: Session, message: pb.Operations, now: float) -> None:
    """Carries out a batch of verbs in its order, then lets the gates decide once."""
    session_id, rated = session.id, dispatcher.books.rates is not None
    for operation in message.operations:
        verb = operation.WhichOneof("verb")
        if verb == "acquire":
            dispatcher.acquire(session, _ticket(session_id, operation.acquire, now), now)
        elif verb == "done":
            done = operation.done
            used = _used(done) if rated else UNKNOWN
            dispatcher.done(session, done.n, done.outcome or Outcome.OK, now, used)
        elif verb == "move":
            move = operation.move
            delay = move.delay_ms / 1000
            dispatcher.move(session, move.n, move.not_instance_id, move.outcome, move.moves, now, delay)
    dispatcher.settle(now)


def held(items: Iterable[pb.HeldLease]) -> list[Held]:
    """Stated leases."""
    return [
        Held(item.n, item.model, item.instance_id, tenant(item.tenant), item.age_ms / 1000, item.moves)
        for item in items
    ]


def tenant(name: str) -> str:
    """A tenant's name on tickets and leases."""
    return "" if name == DEFAULT_TENANT else name[:MAX_TENANT]


def put_rates(into: pb.RateState, state: RateState) -> None:
    """Writes what is left of a tenant's rates."""
    if state.requests is not None:
        _put(into.requests, state.requests)
    if state.tokens is not None:
        _put(into.tokens, state.tokens)


def _put(into: pb.Allowance, one: Allowance) -> None:
    into.limit = one.limit
    into.remaining = one.remaining
    into.reset_ms = math.ceil(one.reset * 1000)


def _used(done: pb.Done) -> Used:
    return Used(done.prompt_tokens, done.completion_tokens, done.tokens_estimated, done.without_tokens)


def _ticket(session_id: str, acquire: pb.Acquire, now: float) -> Ticket:
    deadline_ms = acquire.deadline_ms
    catalog = acquire.catalog_generation
    return Ticket(
        (session_id, acquire.n),
        acquire.model,
        now,
        tenant(acquire.tenant),
        acquire.band or Band.NORMAL,
        now + deadline_ms / 1000 if deadline_ms else math.inf,
        (catalog.incarnation, catalog.n),
        acquire.token_estimate,
        acquire.affinity[:MAX_AFFINITY],
        acquire.trace_parent,
        acquire.wants_progress,
    )
