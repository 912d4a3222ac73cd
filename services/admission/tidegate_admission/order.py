"""Whose turn it is among flows: the highest band first, within it the tenant that has had least.

A band is raised by one each time the oldest of its heads has waited for another `aging`; bands that meet
share by virtual time. The band is raised and not the one flow: otherwise a flood that waits for longer than
`aging` would pass everybody who keeps to his share.

Every flow with a ticket that may be granted has one valid item in the heap of its band, and one by its age.
An item may promise too much (the tenant was charged, the head has gone): that is found when it comes up. It
never promises too little: what makes a flow better is shown at once.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping

from tidegate_admission.fairness import Account, Flow
from tidegate_admission.line import Entry
from tidegate_admission.ticket import Band

_HIGH = int(Band.HIGH)
_ages = itertools.count(1)


class Order:
    """The flows of one gate. `head` gives a flow's first ticket that may be granted now;
    `active`: the tenants with tickets."""

    def __init__(
        self, aging: float, head: Callable[[Flow], Entry | None], active: Mapping[str, Account]
    ) -> None:
        self._aging = aging
        self._active = active
        self._head = head
        self._bands: dict[int, list[tuple[float, Entry, Flow]]] = {int(band): [] for band in Band}
        """(virtual time of the tenant, head, flow): of equal tenants the one whose head arrived first."""
        self._ages: dict[int, list[tuple[float, int, Flow]]] = {int(band): [] for band in Band}
        """(arrival of the head, number, flow)."""

    def better(self, flow: Flow, entry: Entry) -> bool:
        """Whether a ticket's entry beats what its flow has shown, so that it must be shown again."""
        shown, aged = flow.shown, flow.aged
        if shown is None or aged is None or entry[1] < aged[0]:
            return True
        return flow.account.virtual < shown[0] or entry < shown[1]

    def show(self, flow: Flow) -> None:
        """A flow may have become better: a ticket came, or its tenant got something back."""
        head = self._head(flow)
        if head is None:
            return
        shown, aged = flow.shown, flow.aged
        if shown is None or (flow.account.virtual, head) < shown[:2]:
            flow.shown = (flow.account.virtual, head, flow)
            heap = self._bands[flow.band]
            heapq.heappush(heap, flow.shown)
            if len(heap) > self._plenty():
                heap[:] = [item for item in heap if item is item[2].shown]
                heapq.heapify(heap)
        if aged is None or head[1] < aged[0]:
            flow.aged = (head[1], next(_ages), flow)
            ages = self._ages[flow.band]
            heapq.heappush(ages, flow.aged)
            if len(ages) > self._plenty():
                ages[:] = [age for age in ages if age is age[2].aged]
                heapq.heapify(ages)

    def hide(self, flow: Flow) -> None:
        """A flow is passed over until it is shown again."""
        flow.shown = None

    def next(self, now: float) -> Flow | None:
        """The flow whose turn it is; None when nobody waits. `shown[1]` is its head.

        1. Bands in which nobody waits are left out.
        2. Of the others those count which their oldest head raises highest.
        3. Of these the flow whose tenant has had least; of equal ones that whose head arrived first.
        """
        items = [item for heap in self._bands.values() if heap and (item := self._best(heap)) is not None]
        if len(items) < 2:  # 1
            return items[0][2] if items else None
        levels = [self.level(item[2].band, self._oldest(item[2].band), now) for item in items]  # 2
        top = min(levels)
        return min(item for item, level in zip(items, levels, strict=True) if level == top)[2]  # 3

    def minimum(self) -> float:
        """The least virtual time of those who wait; infinite when there are none."""
        items = [self._best(heap) for heap in self._bands.values() if heap]
        return min((item[0] for item in items if item is not None), default=math.inf)

    def level(self, band: int, arrived: float, now: float) -> int:
        """The band to which a wait since `arrived` raises a band."""
        raised = 0
        while band - raised > _HIGH and arrived + self._aging * (raised + 1) <= now:
            raised += 1
        return band - raised

    def _best(self, heap: list[tuple[float, Entry, Flow]]) -> tuple[float, Entry, Flow] | None:
        """The first valid item that promises no more than is true; others are put right or thrown away."""
        while heap:
            item = heap[0]
            virtual, entry, flow = item
            if item is not flow.shown:
                heapq.heappop(heap)
                continue
            head = self._head(flow)
            if head is entry and virtual == flow.account.virtual:
                return item
            if head is None:
                heapq.heappop(heap)
                flow.shown = None
                continue
            flow.shown = item = (flow.account.virtual, head, flow)
            heapq.heapreplace(heap, item)
            if heap[0] is item:
                return item
        return None

    def _oldest(self, band: int) -> float:
        """When the oldest head of a band arrived; as in `_best`."""
        ages = self._ages[band]
        while ages:
            age = ages[0]
            arrived, _, flow = age
            head = self._head(flow) if age is flow.aged else None
            if head is not None and head[1] == arrived:
                return arrived
            if head is not None:
                flow.aged = (head[1], next(_ages), flow)
                heapq.heapreplace(ages, flow.aged)
                continue
            heapq.heappop(ages)
            if age is flow.aged:
                flow.aged = None
        return math.inf

    def _plenty(self) -> int:
        """More items than flows with tickets could explain: then the dead ones are thrown away."""
        return 2 * len(Band) * len(self._active) + 64
