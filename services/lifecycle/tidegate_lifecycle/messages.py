"""What the reconciler is told. One dataclass for each kind; it alone changes the state."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.link import Stream
from tidegate_lifecycle.probes import Load


@dataclass(frozen=True)
class Launched:
    """The server's process runs and begins to load; it isn't ready yet."""

    instance_id: str
    address: str
    pid: int
    at: float
    """When it was launched, monotonic seconds: its start deadline counts from then."""


@dataclass(frozen=True)
class BecameReady:
    """The server answers."""

    instance_id: str


@dataclass(frozen=True)
class StartEnded:
    """The start failed, for people: without paths, environment or secrets."""

    instance_id: str
    kind: str
    """A label of metrics: `refused` (it couldn't even begin), `deadline` or `exited`; of the last, by the
    server's log, `neighbour` (another's memory changed while it measured its own) and `memory` (what was
    reserved for it wasn't enough)."""
    text: str


@dataclass(frozen=True)
class Died:
    """A server that was ready has ended, or no longer answers its health check."""

    instance_id: str
    text: str


@dataclass(frozen=True)
class Gone:
    """The process is verified gone."""

    instance_id: str


@dataclass(frozen=True)
class Sampled:
    """What the server itself reports as running and waiting."""

    instance_id: str
    load: Load
    at: float
    """When it was asked, monotonic seconds."""


@dataclass(frozen=True)
class DemandCame:
    """A report of admission."""

    stream: Stream
    report: pb.DemandReport


@dataclass(frozen=True)
class StreamEnded:
    """The link of an admission is over."""

    stream: Stream


@dataclass(frozen=True)
class DevicesRead:
    """New readings of the cards."""

    devices: tuple[Device, ...]
    began: float
    """When the reading was begun, monotonic seconds."""


@dataclass(frozen=True)
class Learned:
    """The learned load time of a model, in seconds."""

    model: str
    seconds: float


@dataclass(frozen=True)
class Shutdown:
    """The service stops: drain and stop every model server."""

    drain: float
    """Seconds that drains may take."""


@dataclass(frozen=True)
class Order:
    """An operator's order; `done` gets None or a Refused."""

    verb: str
    """load, unload, pin or unpin."""
    model: str
    done: asyncio.Future[None] = field(compare=False)


@dataclass(frozen=True)
class DeviceOrder:
    """An operator takes a device back, or gives it back; `done` gets its id or a Refused."""

    device: str
    """Id or UUID."""
    drain: bool
    done: asyncio.Future[str] = field(compare=False)


@dataclass(frozen=True)
class Broke:
    """A task of the service ended with an exception: fatal."""

    error: BaseException


Message = (
    Launched
    | BecameReady
    | StartEnded
    | Died
    | Gone
    | Sampled
    | DemandCame
    | StreamEnded
    | DevicesRead
    | Learned
    | Shutdown
    | Order
    | DeviceOrder
    | Broke
)
