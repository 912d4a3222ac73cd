"""What all requests of one edge process share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Sized
from typing import Any

from tidegate_edge.catalog import Catalog
from tidegate_edge.envelope import Failure
from tidegate_edge.metrics import Metrics
from tidegate_edge.session import Session
from tidegate_edge.settings import EdgeSettings
from tidegate_edge.upstream import Upstream
from tidegate_edge.workers.peers import Alone


class Bodies:
    """The request bodies that are held now, and their size together. The sum changes only with the table."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """Bytes."""
        self.total = 0
        self._sizes: dict[Hashable, int] = {}

    def hold(self, owner: Hashable, size: int) -> None:
        """`owner` now holds `size` bytes. Raises Failure (503) when that is too much (and holds them)."""
        self.total += size - self._sizes.get(owner, 0)
        self._sizes[owner] = size
        if self.total > self.limit:
            raise Failure("server_is_overloaded", "Too many request bodies are waiting; try again soon.")

    def drop(self, owner: Hashable) -> None:
        """`owner` holds nothing any more. May be called again."""
        self.total -= self._sizes.pop(owner, 0)


class Edge:
    """Settings, the links to the other services and to the model servers, and the requests in flight."""

    def __init__(
        self, settings: EdgeSettings, session: Session, catalog: Catalog, upstream: Upstream
    ) -> None:
        self.settings = settings
        self.session = session
        self.catalog = catalog
        self.upstream = upstream
        self.metrics = Metrics()
        self.bodies = Bodies(settings.max_buffered)
        self.relays: Flights = Flights()
        self.connections: Sized = ()
        """Of clients."""
        self.peers = Alone(self)
        """This process and the others of the same edge."""
        self.draining = False
        """The process is stopping: /ready says so and new requests are refused."""
        self.started = time.monotonic()
        self.metrics.watch(self.gauges)

    def ready(self) -> str:
        """Why requests can't be served now; empty = they can."""
        if self.draining:
            return "draining"
        if not self.catalog.known:
            return "waiting for the catalogue of lifecycle"
        return "" if self.session.connected else "waiting for admission"

    def refused(self, failure: Failure) -> None:
        """A request ended before it was one."""
        self.metrics.refused(failure.code)()

    def gauges(self) -> dict[str, float]:
        """Numbers for the metrics, as they are now."""
        return {
            "workers": 1.0,
            "connections": len(self.connections),
            "in_flight": len(self.relays),
            "buffered_bytes": self.bodies.total,
            "tickets": len(self.session.waiting),
            "leases": len(self.session.held),
            "session_connected": float(self.session.connected),
            "draining": float(self.draining),
        }

    def told(self) -> dict[str, Any]:
        """This process, for the status."""
        return {
            "uptime_s": round(time.monotonic() - self.started, 1),
            "session": self.session.session_id,
            **{name: int(value) for name, value in self.gauges().items() if name != "workers"},
        }


class Flights(Sized):
    """The requests in flight: a set that can be waited for."""

    def __init__(self) -> None:
        self._members: set[Hashable] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._members)

    def add(self, member: Hashable) -> None:
        """A request began."""
        self._members.add(member)
        self._empty.clear()

    def discard(self, member: Hashable) -> None:
        """A request ended. May be called again."""
        self._members.discard(member)
        if not self._members:
            self._empty.set()

    def now(self) -> list[Hashable]:
        """Those in flight now."""
        return list(self._members)

    async def gone(self, patience: float) -> bool:
        """Waits up to `patience` seconds until there are none; whether there are none."""
        if not self._members:
            return True
        try:
            await asyncio.wait_for(self._empty.wait(), patience)
        except TimeoutError:
            return False
        return True
