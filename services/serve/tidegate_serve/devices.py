"""`tidegate devices list|drain|undrain`: what models run on, and what an operator takes back."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis.plain import as_dict
from tidegate_serve import operate
from tidegate_serve.operate import LIFECYCLE, ask, duration, show, size, table


def run(arguments: argparse.Namespace) -> int:
    """Carries out one command; returns the exit status."""
    commands = {"list": _list, "drain": _drain, "undrain": _drain}
    return operate.run(arguments, LIFECYCLE, commands[arguments.action])


async def _list(stub: Any, arguments: argparse.Namespace) -> None:
    status = await ask(stub.GetStatus, pb.GetStatusRequest())
    print(json.dumps(devices_json(status), indent=2) if arguments.json else devices_table(status))


async def _drain(stub: Any, arguments: argparse.Namespace) -> None:
    drain = arguments.action == "drain"
    answer = await ask(stub.DrainDevice, pb.DrainDeviceRequest(device_id=arguments.device, drain=drain))
    show(arguments, answer, _taken if drain else lambda said: f"{said.device_id} is in use again")


def _taken(answer: pb.DrainDeviceResponse) -> str:
    text = f"{answer.device_id} is taken back until `tidegate devices undrain {answer.device_id}`"
    if not answer.instances:
        return f"{text}: nothing runs on it"
    servers = "its server ends" if answer.instances == 1 else f"its {answer.instances} servers end"
    leases = f" when {answer.leases} requests in flight are done" if answer.leases else ""
    return f"{text}: {servers}{leases}"


def devices_json(status: pb.GetStatusResponse) -> list[dict[str, Any]]:
    """Every device with the ids of the instances on it."""
    return [
        as_dict(device) | {"instances": [one.instance_id for one in _on(status, device)]}
        for device in status.devices
    ]


def devices_table(status: pb.GetStatusResponse) -> str:
    """A row for each device: what there is, who has it, and why nothing more can be placed there."""
    if not status.devices:
        return "no devices"
    rows = [("DEVICE", "NAME", "POOL", "TOTAL", "BUDGET", "RESERVED", "OTHERS", "MODELS", "NOTE")]
    for device in status.devices:
        others = size(device.foreign_mib) if device.HasField("foreign_mib") else "-"
        memory = (size(device.total_mib), size(device.budget_mib), size(device.reserved_mib), others)
        models = ", ".join(sorted({one.model for one in _on(status, device)})) or "-"
        rows.append((device.device_id, device.name or "-", device.pool, *memory, models, _note(device)))
    return table(rows)


def _on(status: pb.GetStatusResponse, device: pb.DeviceStatus) -> list[pb.InstanceStatus]:
    return [one for one in status.instances if device.device_id in one.device_ids]


def _note(device: pb.DeviceStatus) -> str:
    notes = ["taken back by an operator"] if device.draining else []
    if device.settling_mib:
        notes.append(f"{size(device.settling_mib)} about to be free")
    if device.problem:
        since = f" (for {duration(device.problem_ms)})" if device.HasField("problem_ms") else ""
        notes.append(f"{device.problem}{since}")
    return "; ".join(notes)
