"""Grants per second of one admission process through real sessions.

Each session keeps a batch of tickets going round: acquire, grant, done; the done of one round is in the next
message with acquires. Admission runs as its own process on one core; this process is the edges.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from grpc import aio

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc
from tidegate.lifecycle.v1 import lifecycle_pb2 as lpb
from tidegate.lifecycle.v1 import lifecycle_pb2_grpc as lpb_grpc
from tidegate_chassis import rpc

SLOTS = 100_000


class _Lifecycle(lpb_grpc.LifecycleServiceServicer):
    """Says once that a model is ready, with more slots than the edges ask for."""

    async def Coordinate(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        one = lpb.InstanceSupply(
            instance_id="m-1", address="http://x", state=lpb.INSTANCE_STATE_READY, slots=SLOTS
        )
        model = lpb.ModelSupply(model="m", max_concurrent=SLOTS, max_queue=SLOTS, instances=[one])
        report = lpb.SupplyReport(
            generation=lpb.Generation(incarnation=1, n=1), whole=True, settled=True, models=[model]
        )
        yield lpb.CoordinateResponse(supply=report)
        async for _ in request_iterator:
            pass


async def _session(stub: Any, name: str, batch: int, until: float) -> int:
    call = stub.Session(wait_for_ready=True)
    hello = pb.Hello(session_id=name, stream_seq=1, holder="bench", last=True)
    await call.write(pb.SessionRequest(hello=hello))
    granted, n = 0, 0
    held: list[int] = []
    try:
        await call.read()
        while time.monotonic() < until:
            request = pb.SessionRequest()
            operations = request.operations.operations
            for done in held:
                operations.add().done.n = done
            for _ in range(batch):
                n += 1
                acquire = operations.add().acquire
                acquire.n = n
                acquire.model = "m"
            await call.write(request)
            held = []
            while len(held) < batch:
                response = await call.read()
                held += [answer.grant.n for answer in response.answers]
            granted += batch
    finally:
        call.cancel()
    return granted


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(sessions: int, batch: int, seconds: float, folder: Path) -> dict[str, float]:
    """One figure: grants per second, and of a second of the admission process's CPU."""
    config = folder / "bench.yaml"
    config.write_text(
        f"admission:\n  listen: unix:{folder}/a.sock\nlifecycle:\n  listen: unix:{folder}/l.sock\n"
        "telemetry:\n  log_level: error\n"
    )
    server = aio.server()
    lpb_grpc.add_LifecycleServiceServicer_to_server(_Lifecycle(), server)  # type: ignore[abstract]
    server.add_insecure_port(f"unix:{folder}/l.sock")
    await server.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidegate_admission", "--config", str(config)
    )
    try:
        async with rpc.channel(f"unix:{folder}/a.sock") as channel:
            stub = pb_grpc.AdmissionServiceStub(channel)
            await _session(stub, "warm-up", batch, time.monotonic() + 1.0)
            cpu, begun = _cpu(process.pid), time.monotonic()
            rounds = [_session(stub, f"s{i}", batch, begun + seconds) for i in range(sessions)]
            granted = sum(await asyncio.gather(*rounds))
            took, used = time.monotonic() - begun, _cpu(process.pid) - cpu
        return {
            "sessions": sessions,
            "batch": batch,
            "grants_per_second": round(granted / took),
            "grants_per_cpu_second": round(granted / used),
        }
    finally:
        process.kill()
        await process.wait()
        await server.stop(None)


def run(seconds: float = 3.0) -> list[dict[str, float]]:
    """Prints and returns the figures."""
    figures = []
    for sessions, batch in ((1, 1), (1, 16), (4, 16), (4, 64), (1, 256)):
        with tempfile.TemporaryDirectory() as folder:
            figures.append(asyncio.run(measure(sessions, batch, seconds, Path(folder))))
        print(json.dumps(figures[-1]), flush=True)
    return figures


if __name__ == "__main__":
    run()
