"""What the reconciler is told. One dataclass for each kind; it alone changes the state."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.catalog import Catalog, Model
from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.footprints.record import Footprint
from tidegate_lifecycle.footprints.verdict import Discarded
from tidegate_lifecycle.hub.prepare import Progress
from tidegate_lifecycle.link import Stream
from tidegate_lifecycle.needs import Estimate
from tidegate_lifecycle.probes import Load
from tidegate_lifecycle.world import Policy


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
    """A label of metrics: `download` (the model's files can't be had), `refused` (it couldn't even begin),
    `deadline` or `exited`; of the last, by the server's log, `neighbour` (another's memory changed while it
    measured its own) and `memory` (what was reserved for it wasn't enough)."""
    text: str


@dataclass(frozen=True)
class Fetching:
    """How far the download before a server's launch is."""

    instance_id: str
    progress: Progress | None
    """None = it is over, whatever came of it."""


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
class Estimated:
    """What a model's files say that it needs, or why they don't."""

    model: Model
    """With the settings for which it was reckoned."""
    estimate: Estimate


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
class Measured:
    """A server's footprint, or why there is none."""

    instance_id: str
    model: str
    outcome: Footprint | Discarded


@dataclass(frozen=True)
class MeasureOrder:
    """An operator wants a footprint now; `done` gets it or a Refused."""

    model: str
    done: asyncio.Future[Footprint] = field(compare=False)


@dataclass(frozen=True)
class FootprintOrder:
    """An operator's change of the footprints; `done` gets how many, or a Refused."""

    put: tuple[Footprint, ...]
    remove: tuple[tuple[str, str], ...]
    """By model and signature."""
    done: asyncio.Future[int] = field(compare=False)


@dataclass(frozen=True)
class FootprintsKept:
    """A change of the footprints was written down, or couldn't be."""

    order: Measured | FootprintOrder
    kept: tuple[Footprint, ...] | str
    """All that there are now, or why nothing was kept."""


@dataclass(frozen=True)
class DeviceOrder:
    """An operator takes a device back, or gives it back; `done` gets its id or a Refused."""

    device: str
    """Id or UUID."""
    drain: bool
    done: asyncio.Future[str] = field(compare=False)


@dataclass(frozen=True)
class Reloaded:
    """The configuration file has changed, was checked as a whole, and is to be put into effect."""

    catalog: Catalog
    policy: Policy
    needs_restart: tuple[str, ...] = ()
    """Keys that have changed and that only a restart of the service puts into effect."""


@dataclass(frozen=True)
class ConfigRefused:
    """The configuration file has changed and can't be used: what is wrong with it, one problem each."""

    problems: tuple[str, ...]


@dataclass(frozen=True)
class Broke:
    """A task of the service ended with an exception: fatal."""

    error: BaseException


Message = (
    Launched
    | BecameReady
    | StartEnded
    | Fetching
    | Died
    | Gone
    | Sampled
    | DemandCame
    | StreamEnded
    | DevicesRead
    | Estimated
    | Learned
    | Shutdown
    | Order
    | Measured
    | MeasureOrder
    | FootprintOrder
    | FootprintsKept
    | DeviceOrder
    | Reloaded
    | ConfigRefused
    | Broke
)
