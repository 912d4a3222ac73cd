"""The catalogue as lifecycle tells it: names, aliases, settings for the wire, and each model's state."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass

import grpc
import structlog

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate.lifecycle.v1 import lifecycle_pb2_grpc
from tidegate_chassis import rpc

log = structlog.get_logger("tidegate.edge.catalog")


@dataclass(frozen=True, slots=True)
class Model:
    """One model."""

    name: str
    aliases: tuple[str, ...]
    upstream_model: str
    """The name that the server knows, to be written into the body; empty = the body passes unchanged."""
    request_defaults: dict[str, bytes]
    """Merged under the caller's fields: JSON texts by key."""
    state: str
    """ready, loading, sleeping, stopped or failed."""
    engine: str
    created_age: float
    """Seconds that the entry has been known."""


class Catalog:
    """The last catalogue received. It stays when lifecycle is away."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._models: dict[str, Model] = {}
        self._names: dict[str, Model] = {}
        self._received = asyncio.Event()
        self.generation: tuple[int, int] = (0, 0)
        """(incarnation, n) of the catalogue, told with each ticket."""

    @property
    def known(self) -> bool:
        """A catalogue has been received at least once."""
        return self._received.is_set()

    async def available(self, patience: float) -> bool:
        """Whether a catalogue is known, waiting up to `patience` seconds for it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._received.wait(), patience)
        return self.known

    def find(self, name: str) -> Model | None:
        """A model by its name or an alias."""
        return self._names.get(name)

    def models(self) -> list[Model]:
        """All models, by name."""
        return list(self._models.values())

    async def run(self) -> None:
        """Watches lifecycle until cancelled."""
        while True:
            for delay in rpc.reconnect_delays():
                before = self.generation
                async with rpc.connected(self._address) as channel:
                    await self._watch(lifecycle_pb2_grpc.LifecycleServiceStub(channel))
                await asyncio.sleep(delay)
                if self.generation != before:
                    break  # it had answered: begin with short delays again

    async def _watch(self, stub: lifecycle_pb2_grpc.LifecycleServiceAsyncStub) -> None:
        call = stub.WatchCatalog(pb.WatchCatalogRequest())
        try:
            async for catalog in call:
                self._take(catalog)
        except grpc.RpcError as error:
            log.warning("the catalogue's stream broke; the last one is kept", error=rpc.describe(error))
        finally:
            call.cancel()

    def _take(self, catalog: pb.WatchCatalogResponse) -> None:
        models = [_model(entry) for entry in catalog.models]
        self._models = {model.name: model for model in sorted(models, key=lambda model: model.name)}
        self._names = {alias: model for model in models for alias in model.aliases} | self._models
        self.generation = (catalog.generation.incarnation, catalog.generation.n)
        self._received.set()


def _model(entry: pb.CatalogModel) -> Model:
    defaults = json.loads(entry.request_defaults_json) if entry.request_defaults_json else {}
    return Model(
        name=entry.name,
        aliases=tuple(entry.aliases),
        upstream_model=entry.upstream_model,
        request_defaults={key: json.dumps(value).encode() for key, value in defaults.items()},
        state=pb.ModelState.Name(entry.state).removeprefix("MODEL_STATE_").lower(),
        engine=entry.engine,
        created_age=entry.age_ms / 1000,
    )
