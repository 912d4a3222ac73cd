"""What all requests of one edge process share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Sized
from typing import Any

from tidegate_edge.catalog import Catalog
from tidegate_edge.envelope import Failure
from tidegate_edge.metrics import Metrics
from tidegate_edge.responses import Responses
from tidegate_edge.session import Session
from tidegate_edge.settings import EdgeSettings
from tidegate_edge.spool import Spools
from tidegate_edge.upstream import Upstream
from tidegate_edge.workers.peers import Alone


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
        self.spools = Spools(
            settings.spool_dir, settings.spool_above, settings.max_buffered, settings.max_spooled
        )
        self.responses = Responses()
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
            "buffered_bytes": self.spools.memory.total,
            "spooled_bytes": self.spools.disk.total,
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
