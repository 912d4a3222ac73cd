"""Which instance served the requests of an affinity last. Pure, and bounded: the longest unused go."""

from __future__ import annotations

from collections import OrderedDict

from tidegate_admission.ticket import Ticket

MAX_AFFINITY = 128
"""Characters of an affinity that count."""
MAX_AFFINITIES = 10_000
"""Remembered at each gate."""


class Affinities:
    """Instances by tenant and affinity: nobody steers, or learns of, another tenant's requests."""

    __slots__ = ("_instances",)

    def __init__(self) -> None:
        self._instances: OrderedDict[tuple[str, str], str] = OrderedDict()

    def of(self, ticket: Ticket) -> str:
        """The instance that served such a request last; empty = none is known."""
        return self._instances.get((ticket.tenant, ticket.affinity), "")

    def granted(self, ticket: Ticket, instance_id: str) -> None:
        """A ticket with an affinity was granted this instance."""
        key = (ticket.tenant, ticket.affinity)
        self._instances[key] = instance_id
        self._instances.move_to_end(key)
        if len(self._instances) > MAX_AFFINITIES:
            self._instances.popitem(last=False)

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._instances)
