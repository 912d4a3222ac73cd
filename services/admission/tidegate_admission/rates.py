"""Requests and tokens per minute of a tenant: reserved at the offer, given back or settled at the end.

Pure. A bucket holds one minute's worth and fills evenly; all its numbers are whole, so nothing drifts and
what is given back is exactly what was taken. A tenant's buckets count over all edges and all models.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tidegate_admission.fairness import DEFAULT_TENANT, MAX_IDLE, TenantRule, Tenants
from tidegate_admission.tally import blend
from tidegate_admission.ticket import Id, Outcome, Ticket

GUESS = 500
"""Tokens that are reserved when neither the request nor the tenant's past says how many there will be."""
_PARTS = 60_000_000_000
"""Parts of one request or token: at a limit of n per minute, n parts come back each nanosecond."""
_FRUITLESS = frozenset((Outcome.UPSTREAM_ERROR, Outcome.CONNECT_FAILED, Outcome.BACKPRESSURE))
"""Outcomes of leases that cost no tokens, unless some were counted."""


class Used(NamedTuple):
    """Tokens that a lease has used."""

    prompt: int = 0
    completion: int = 0
    estimated: bool = False
    """They were counted or estimated, because the response told none."""
    nothing: bool = False
    """It is known that there were none; else none told means that it isn't known how many."""


class Allowance(NamedTuple):
    """What is left of one rate."""

    limit: int
    """Per minute."""
    remaining: int
    reset: float
    """Seconds until nothing of it is used any more."""


class RateState(NamedTuple):
    """A tenant's rates at one moment; None = it has no such rate."""

    requests: Allowance | None
    tokens: Allowance | None


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a request can't be let through now."""

    kind: str
    """`requests` or `tokens`."""
    limit: int
    remaining: int
    asked: int
    wait: float
    """Seconds until the bucket holds what is asked."""

    def words(self, tenant: str) -> str:
        """For the caller."""
        return (
            f"tenant '{tenant or DEFAULT_TENANT}' may have {self.limit} {self.kind} per minute: "
            f"{self.remaining} left, {self.asked} asked for; try again in {math.ceil(self.wait)} s"
        )


class Bucket:
    """One rate of one tenant: at most `limit` at once, and `limit` more each minute."""

    __slots__ = ("_parts", "_since", "limit")

    def __init__(self, limit: int, content: int, since: float) -> None:
        """`content`: what it held at the time `since` (monotonic seconds)."""
        self.limit = limit
        self._parts = content * _PARTS
        self._since = _nanoseconds(since)

    def take(self, count: int, now: float) -> None:
        """Takes, whether it holds as much or not: what is missing is a debt, filled up first."""
        self._fill(now)
        self._parts -= count * _PARTS

    def put(self, count: int) -> None:
        """Puts back; what doesn't fit in is gone."""
        self._parts += count * _PARTS  # cut to what fits when it is looked at: the same, and needs no clock

    def wait(self, count: int, now: float) -> float:
        """Seconds until it holds `count`, which must not be more than `limit`; 0 = it does."""
        self._fill(now)
        return max(0, -((self._parts - count * _PARTS) // self.limit)) / 1e9

    def allowance(self, now: float) -> Allowance:
        """What is left."""
        reset = self.wait(self.limit, now)
        return Allowance(self.limit, max(0, self._parts // _PARTS), reset)

    def _fill(self, now: float) -> None:
        at = _nanoseconds(now)
        if at > self._since:
            self._parts += (at - self._since) * self.limit
            self._since = at
        self._parts = min(self._parts, self.limit * _PARTS)


class Meter:
    """The buckets of one tenant, and what its tickets and leases have reserved of them."""

    __slots__ = ("held", "means", "requests", "tokens")

    def __init__(self, rule: TenantRule, full: bool, since: float) -> None:
        """Not `full`: without a burst, because nobody knows what was used before `since`."""
        requests, tokens = rule.requests, rule.tokens
        self.requests = Bucket(requests, requests if full else 1, since) if requests else None
        self.tokens = Bucket(tokens, tokens if full else 0, since) if tokens else None
        self.held: dict[Id, int] = {}
        """Tickets and leases with a reservation: one request each, and so many tokens."""
        self.means: dict[str, float] = {}
        """Tokens that a request has used of late, by model."""

    def reserve(self, ticket: Ticket, now: float) -> Shortage | None:
        """Takes one request and an estimate of tokens, all or nothing; gives what is missing for longest."""
        tokens = self._estimate(ticket, self.tokens.limit) if self.tokens is not None else 0
        short = [
            Shortage(kind, bucket.limit, bucket.allowance(now).remaining, asked, wait)
            for kind, bucket, asked in (("requests", self.requests, 1), ("tokens", self.tokens, tokens))
            if bucket is not None and (wait := bucket.wait(asked, now)) > 0.0
        ]
        if short:
            return max(short, key=lambda one: one.wait)
        if self.requests is not None:
            self.requests.take(1, now)
        if self.tokens is not None:
            self.tokens.take(tokens, now)
        ticket.meter = self
        self.held[ticket.id] = tokens
        return None

    def refund(self, ticket: Ticket) -> None:
        """It ended without a lease, or with one that nobody used: all is given back."""
        tokens = self._let_go(ticket)
        if self.requests is not None:
            self.requests.put(1)
        if self.tokens is not None:
            self.tokens.put(tokens)

    def lost(self, ticket: Ticket) -> None:
        """A lease ended, not by its session: what was reserved counts as used."""
        self._let_go(ticket)

    def settle(self, ticket: Ticket, outcome: int, used: Used, now: float) -> None:
        """A lease was given back.

        1. Nobody used it: all that was reserved is given back.
        2. Its tokens are known: they are paid, more or less than was reserved. Of a prompt that is only
           estimated (by the size of what was sent, an image too) no more than one minute's worth.
        3. It came to nothing: the tokens are given back, the request counts.
        4. It isn't known what it used: what was reserved counts as used.
        """
        if outcome == Outcome.UNUSED:  # 1
            self.refund(ticket)
            return
        reserved = self._let_go(ticket)
        if self.tokens is None:
            return
        if used.prompt or used.completion:  # 2
            prompt = min(used.prompt, self.tokens.limit) if used.estimated else used.prompt
            self._learn(ticket.model, prompt + used.completion)
            over = prompt + used.completion - reserved
            if over > 0:
                self.tokens.take(over, now)
            else:
                self.tokens.put(-over)
        elif used.nothing or outcome in _FRUITLESS:  # 3
            self.tokens.put(reserved)

    def fill(self) -> None:
        """Nothing was used before it began, after all: fills up what it began without."""
        if self.requests is not None:
            self.requests.put(self.requests.limit - 1)
        if self.tokens is not None:
            self.tokens.put(self.tokens.limit)

    def state(self, now: float) -> RateState:
        """What is left of each rate."""
        return RateState(
            self.requests.allowance(now) if self.requests is not None else None,
            self.tokens.allowance(now) if self.tokens is not None else None,
        )

    def idle(self, now: float) -> bool:
        """It is full and nothing is reserved: a new one would be the same."""
        buckets = (self.requests, self.tokens)
        return not self.held and all(one is None or not one.wait(one.limit, now) for one in buckets)

    def _estimate(self, ticket: Ticket, limit: int) -> int:
        """Never more than one minute's worth: who asks for more waits for a full bucket and pays later."""
        tokens = ticket.tokens or math.ceil(self.means.get(ticket.model, GUESS))
        return min(tokens, limit)

    def _learn(self, model: str, tokens: int) -> None:
        mean = self.means.get(model, 0.0)
        if not mean and len(self.means) >= MAX_IDLE:
            del self.means[next(iter(self.means))]
        self.means[model] = blend(mean, tokens)

    def _let_go(self, ticket: Ticket) -> int:
        ticket.meter = None
        return self.held.pop(ticket.id)


class Rates:
    """The meters of all tenants that have a rate.

    A tenant that isn't configured goes by `default`'s rates, with a meter of its own. Of these so many are
    remembered; one is forgotten when a new one would be the same, and while there is none of that sort, new
    names share one meter: made-up names neither fill the memory nor lead around a limit.
    """

    def __init__(self, tenants: Tenants, now: float) -> None:
        """Its meters begin without a burst at `now`, until `heard` says that they may be full."""
        self._tenants, self._started = tenants, now
        self._full: bool | None = None
        rules = {"": tenants.default, **tenants.named}
        self.configured = {name: self._meter(rule) for name, rule in rules.items() if rule.rated}
        """By name; the default's is empty."""
        self._others: OrderedDict[str, Meter] = OrderedDict()
        self._crowd = self._meter(tenants.default) if tenants.default.rated else None

    def heard(self, first: bool) -> None:
        """Lifecycle was heard; `first`: it says that there was no admission before this one. The first word
        counts."""
        if self._full is None:
            self._full = first
            for meter in self.meters() if first else ():
                meter.fill()

    def find(self, tenant: str, now: float) -> Meter | None:
        """A tenant's meter; None when it has no rate."""
        if not tenant or tenant in self._tenants.named:
            return self.configured.get(tenant)
        if self._crowd is None:
            return None
        meter = self._others.get(tenant)
        if meter is not None:
            self._others.move_to_end(tenant)
            return meter
        if len(self._others) >= MAX_IDLE and not self._forget(now):
            return self._crowd
        meter = self._others[tenant] = self._meter(self._tenants.default)
        return meter

    def reserve(self, ticket: Ticket, now: float) -> Shortage | None:
        """See `Meter.reserve`."""
        meter = self.find(ticket.tenant, now)
        return meter.reserve(ticket, now) if meter is not None else None

    def state(self, tenant: str, now: float) -> RateState | None:
        """What a tenant has left; None when it has no rate."""
        meter = self.find(tenant, now)
        return meter.state(now) if meter is not None else None

    def meters(self) -> Iterator[Meter]:
        """All of them."""
        yield from self.configured.values()
        yield from self._others.values()
        if self._crowd is not None:
            yield self._crowd

    def _meter(self, rule: TenantRule) -> Meter:
        return Meter(rule, bool(self._full), self._started)

    def _forget(self, now: float) -> bool:
        """Forgets the one that was asked for longest ago, if it may be; if not, another one is tried next."""
        name, meter = next(iter(self._others.items()))
        if not meter.idle(now):
            self._others.move_to_end(name)
            return False
        del self._others[name]
        return True


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
