"""Waiting for a model that was ordered to load: what happens meanwhile, and how it ends."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from grpc import aio

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis.plain import word
from tidegate_serve.operate import LOST, Failed, ask, duration, size

PACE = 0.25
"""Seconds between two looks."""
PATIENCE = 30.0
"""Seconds that lifecycle may be away before the wait is given up."""


async def wait_until_ready(stub: Any, name: str) -> pb.ModelStatus:
    """Returns the model's status when it is ready; Failed, with the reason, when that came to nothing.

    1. Ready: done.
    2. It can't be had now, or a start has failed since: Failed with what the service says.
    3. The service is lost: the order may be lost with it, so it is given again when the service is back.
    4. Ctrl-C: the load goes on.
    """
    teller, failed, lost_at = _Teller(name), None, None
    try:
        while True:
            try:
                if lost_at is not None:  # 3
                    await ask(stub.LoadModel, pb.LoadModelRequest(model=name))
                    failed, lost_at = None, None
                status: pb.GetStatusResponse = await ask(stub.GetStatus, pb.GetStatusRequest())
            except aio.AioRpcError as error:
                lost_at = time.monotonic() if lost_at is None else lost_at
                if error.code() not in LOST or time.monotonic() - lost_at > PATIENCE:
                    raise
                teller.tell("lifecycle has gone; waiting for it")
                await asyncio.sleep(PACE)
                continue
            model = next((one for one in status.models if one.model == name), None)
            if model is None:
                raise Failed(f"{name} was taken out of the configuration")
            failed = model.failed_loads if failed is None else failed
            if model.state == pb.MODEL_STATE_READY:  # 1
                return model
            if model.reason or model.failed_loads > failed:  # 2
                raise Failed(f"{name} can't be loaded: {model.message or 'its start failed'}")
            teller.tell(phase(model, [one for one in status.instances if one.model == name]))
            await asyncio.sleep(PACE)
    except asyncio.CancelledError:  # 4
        text = f"the load of {name} goes on; `tidegate events --model {name} -f` shows how it ends"
        raise Failed(text) from None
    finally:
        teller.end()


def phase(model: pb.ModelStatus, instances: list[pb.InstanceStatus]) -> str:
    """What happens to a model that isn't ready yet."""
    if model.HasField("download"):
        return download_text(model.download)
    starting = [one for one in instances if one.state == pb.INSTANCE_STATE_STARTING]
    if starting:
        expected = f", usually {duration(model.load_time_ms)}" if model.load_time_ms else ""
        return f"starting on {', '.join(starting[0].device_ids)}{expected}"
    words = sorted({word(pb.InstanceState.DESCRIPTOR, one.state) for one in instances})
    return model.message or ", ".join(words) or word(pb.ModelState.DESCRIPTOR, model.state)


def download_text(download: pb.Download) -> str:
    """How far the files are that a model needs before it can start."""
    there, rate = size(download.done_bytes >> 20), size(download.bytes_per_second >> 20)
    whole = f" of {size(download.total_bytes >> 20)}" if download.total_bytes else ""
    return f"downloading, {there}{whole} there" + (f", {rate}/s" if download.bytes_per_second else "")


class _Teller:
    """Says what happens on stderr: on a terminal in one line that is written anew, else when it changes."""

    def __init__(self, name: str) -> None:
        self._name, self._began, self._last = name, time.monotonic(), ""
        self._terminal = sys.stderr.isatty()

    def tell(self, text: str) -> None:
        took = duration(round((time.monotonic() - self._began) * 1000))
        if self._terminal:
            print(f"\r\033[K{self._name}: {text} ({took})", end="", file=sys.stderr, flush=True)
        elif text != self._last:
            print(f"{self._name}: {text} ({took})", file=sys.stderr, flush=True)
        self._last = text

    def end(self) -> None:
        if self._terminal and self._last:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
