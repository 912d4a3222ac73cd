"""The RPCs of footprints: translated, and handed to the reconciler."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import grpc
from grpc import aio

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis.errors import Refused
from tidegate_lifecycle import messages
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.fleet import Fleet
from tidegate_lifecycle.footprints import old
from tidegate_lifecycle.footprints.old import LARGEST_MIB
from tidegate_lifecycle.footprints.record import IMPORTED, Footprint, reserve, signature

WRITE = 30.0
"""Seconds in which a change must be written down."""
LARGEST_FILE = 2**20
MOST = 10_000
"""Footprints in one import."""

_Answer = TypeVar("_Answer")
_Context = aio.ServicerContext[Any, Any]


class FootprintsServicer:
    """Part of the servicer of the whole contract."""

    fleet: Fleet
    post: Callable[[messages.Message], None]

    async def ListFootprints(  # noqa: N802 - the contract's name
        self, request: pb.ListFootprintsRequest, context: _Context
    ) -> pb.ListFootprintsResponse:
        """What is kept, be its model still there or not."""
        found = self.fleet.catalog.find(request.model)
        name = found.name if found is not None else request.model
        mine = [item for item in self.fleet.footprints.known.values() if name in ("", item.model)]
        return pb.ListFootprintsResponse(
            footprints=[self._told(item) for item in sorted(mine, key=lambda item: (item.model, -item.at))]
        )

    async def MeasureFootprint(  # noqa: N802
        self, request: pb.MeasureFootprintRequest, context: _Context
    ) -> pb.MeasureFootprintResponse:
        """Takes the samples and keeps the result; FAILED_PRECONDITION when there is none."""
        model = self._find(request.model)
        done: asyncio.Future[Footprint] = asyncio.get_running_loop().create_future()
        self.post(messages.MeasureOrder(model.name, done))
        return pb.MeasureFootprintResponse(footprint=self._told(await _outcome(done, None)))

    async def ImportFootprints(  # noqa: N802
        self, request: pb.ImportFootprintsRequest, context: _Context
    ) -> pb.ImportFootprintsResponse:
        """Takes in what fits the models there are; INVALID_ARGUMENT and nothing, when a field is wrong."""
        if len(request.footprints) > MOST or len(request.memory_footprints_json) > LARGEST_FILE:
            raise _invalid(f"at most {MOST} footprints, and 1 MiB of memory_footprints_json, at one time")
        taken: dict[tuple[str, str], Footprint] = {}
        left_out: list[str] = []
        for number, item in enumerate(request.footprints):
            _check(f"footprints.{number}", item)
            self._take(item, taken, left_out)
        if request.memory_footprints_json:
            self._take_old(request.memory_footprints_json, taken, left_out)
        if taken:
            await self._change(put=tuple(taken.values()))
        return pb.ImportFootprintsResponse(imported=len(taken), left_out=left_out)

    async def DeleteFootprint(  # noqa: N802
        self, request: pb.DeleteFootprintRequest, context: _Context
    ) -> pb.DeleteFootprintResponse:
        """Forgets one or all of a model; NOT_FOUND when there is none."""
        found = self.fleet.catalog.find(request.model)
        name = found.name if found is not None else request.model
        known = self.fleet.footprints.known
        keys = [key for key in known if key[0] == name and request.signature in ("", key[1])]
        if not keys:
            which = f" with the signature {request.signature[:80]!r}" if request.signature else ""
            text = f"there is no footprint of {name[:200]!r}{which}"
            raise Refused(grpc.StatusCode.NOT_FOUND, "REASON_NOT_FOUND", text)
        return pb.DeleteFootprintResponse(deleted=await self._change(remove=tuple(keys)))

    # -- helpers -----------------------------------------------------------------------------------

    def _find(self, name: str) -> Model:
        model = self.fleet.catalog.find(name)
        if model is None:
            raise Refused(grpc.StatusCode.NOT_FOUND, "REASON_NOT_FOUND", f"there is no model {name[:200]!r}")
        return model

    async def _change(self, put: tuple[Footprint, ...] = (), remove: tuple[tuple[str, str], ...] = ()) -> int:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.post(messages.FootprintOrder(put, remove, done))
        return await _outcome(done, WRITE)

    def _told(self, item: Footprint) -> pb.Footprint:
        model = self.fleet.catalog.models.get(item.model)
        current = model is not None and signature(model, item.kind, item.count) == item.signature
        return pb.Footprint(
            model=item.model,
            signature=item.signature,
            mib_per_device=item.mib,
            confidence=item.confidence,
            source=item.source,
            samples=item.samples,
            age_ms=max(0, int((time.time() - item.at) * 1000)),
            card=item.kind,
            device_count=item.count,
            reserve_mib=item.reserve_mib,
            current=current,
        )

    def _take(self, item: pb.Footprint, taken: dict[tuple[str, str], Footprint], left_out: list[str]) -> None:
        """One with a signature as it is; without, for the model as it is configured now."""
        model = self.fleet.catalog.find(item.model)
        if model is None:
            left_out.append(f"{item.model}: there is no such model")
            return
        count, at = item.device_count or 1, time.time() - item.age_ms / 1000
        kinds = [item.card] if item.card or item.signature else self._kinds(model)
        if not kinds:
            left_out.append(f"{item.model}: its pool has no card that a driver names; give `card`")
        for kind in kinds:
            new = self._imported(model, kind, count, item.mib_per_device, at, item.signature)
            if item.reserve_mib:
                new = replace(new, reserve_mib=item.reserve_mib)
            confidence, samples = item.confidence or 1.0, item.samples or 1
            taken[new.key] = replace(new, confidence=confidence, samples=samples)

    def _take_old(self, text: str, taken: dict[tuple[str, str], Footprint], left_out: list[str]) -> None:
        try:
            records, odd = old.read(text)
        except ValueError as error:
            raise _invalid(f"memory_footprints_json: {error}") from None
        left_out += odd
        for record in records:
            models = [
                model
                for model in self.fleet.catalog.models.values()
                if record.source in (model.source, model.name, *model.aliases)
            ]
            if not models:
                left_out.append(f"{record.source[:200]}: no model has that name or source")
            for model in models:
                kinds = self._kinds(model)
                why = old.mismatch(record, model) or (
                    "" if kinds else "its pool has no card that a driver names"
                )
                if why:
                    left_out.append(f"{record.source[:200]}: {why}")
                    continue
                for kind in kinds:
                    new = self._imported(model, kind, record.count, record.mib, record.at)
                    taken[new.key] = new

    def _imported(
        self, model: Model, kind: str, count: int, mib: int, at: float, signed: str = ""
    ) -> Footprint:
        mark = signed or signature(model, kind, count)
        limit = min(self._budgets(model, kind), default=LARGEST_MIB)
        return Footprint(
            model.name, mark, kind, count, mib, reserve(mib, max(mib, limit)), 1.0, 1, IMPORTED, at
        )

    def _kinds(self, model: Model) -> list[str]:
        mine = (device.name for device in self.fleet.devices.values() if device.pool == model.pool)
        return sorted({name for name in mine if name})

    def _budgets(self, model: Model, kind: str) -> Iterable[int]:
        for device in self.fleet.devices.values():
            if device.pool == model.pool and device.name == kind:
                yield device.budget_mib


def _check(path: str, item: pb.Footprint) -> None:
    """INVALID_ARGUMENT names the field, its value and what is allowed."""
    checks = (
        ("model", item.model[:80], 1 <= len(item.model) <= 128, "the name of a model"),
        (
            "signature",
            item.signature[:80],
            re.fullmatch(r"[0-9a-f]{0,64}", item.signature),
            "hexadecimal digits",
        ),
        (
            "mib_per_device",
            item.mib_per_device,
            1 <= item.mib_per_device <= LARGEST_MIB,
            f"1 to {LARGEST_MIB}",
        ),
        ("reserve_mib", item.reserve_mib, item.reserve_mib <= LARGEST_MIB, f"0 to {LARGEST_MIB}"),
        ("confidence", item.confidence, 0 <= item.confidence <= 1, "0 to 1"),
        ("samples", item.samples, item.samples <= 1_000_000, "0 to 1000000"),
        ("device_count", item.device_count, item.device_count <= 64, "0 to 64"),
        ("card", item.card[:80], len(item.card) <= 200 and item.card.isprintable(), "a product's name"),
        ("age_ms", item.age_ms, item.age_ms <= 2**53, "0 to 2**53"),
    )
    for name, value, fine, allowed in checks:
        if not fine or (isinstance(value, float) and math.isnan(value)):
            raise _invalid(f"{path}.{name}: {value!r} is not allowed; give {allowed}")


async def _outcome(done: asyncio.Future[_Answer], limit: float | None) -> _Answer:
    async with asyncio.timeout(limit):
        return await done


def _invalid(text: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, "REASON_INVALID", text)
