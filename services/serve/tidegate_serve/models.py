"""`tidegate models list|load|unload|pin|unpin`: what there is, and what an operator orders."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import grpc
from grpc import aio

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis.plain import as_dict, word
from tidegate_serve import operate
from tidegate_serve.loading import download_text, wait_until_ready
from tidegate_serve.operate import LIFECYCLE, Failed, ask, duration, show, size, table

_STATES = pb.ModelState.DESCRIPTOR


def run(arguments: argparse.Namespace) -> int:
    """Carries out one command; returns the exit status."""
    commands = {"list": _list, "load": _load, "unload": _unload, "pin": _pin, "unpin": _pin}
    return operate.run(arguments, LIFECYCLE, commands[arguments.action])


async def _list(stub: Any, arguments: argparse.Namespace) -> None:
    status = await ask(stub.GetStatus, pb.GetStatusRequest())
    print(json.dumps(models_json(status), indent=2) if arguments.json else models_table(status))


async def _load(stub: Any, arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    try:
        answer = await ask(stub.LoadModel, pb.LoadModelRequest(model=arguments.model))
    except aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
            raise
        raise Failed(f"{arguments.model} can't be loaded: {error.details()}") from None
    if arguments.no_wait:
        show(
            arguments,
            answer,
            lambda said: f"{said.model} is {word(_STATES, said.state)}: its load is ordered",
        )
        return
    status = await wait_until_ready(stub, answer.model)
    took = round((time.monotonic() - began) * 1000)
    show(arguments, status, lambda model: f"{model.model} is ready after {duration(took)}")


async def _unload(stub: Any, arguments: argparse.Namespace) -> None:
    answer = await ask(stub.UnloadModel, pb.UnloadModelRequest(model=arguments.model))
    show(arguments, answer, _unloaded)


def _unloaded(answer: pb.UnloadModelResponse) -> str:
    if not answer.instances:
        return f"{answer.model} has no server"
    servers = "its server ends" if answer.instances == 1 else f"its {answer.instances} servers end"
    leases = f" when {answer.leases} requests in flight are done" if answer.leases else ""
    return f"{answer.model} is unloaded: {servers}{leases}"


async def _pin(stub: Any, arguments: argparse.Namespace) -> None:
    pinned = arguments.action == "pin"
    answer = await ask(stub.PinModel, pb.PinModelRequest(model=arguments.model, pinned=pinned))
    show(arguments, answer, lambda said: _pinned(said, pinned))


def _pinned(answer: pb.PinModelResponse, asked: bool) -> str:
    if asked:
        return f"{answer.model} is pinned until lifecycle is started again: never idle-stopped, never evicted"
    if answer.pinned:
        return f"{answer.model} has no pin any more, but is always_on"
    return f"{answer.model} is not pinned any more"


def models_json(status: pb.GetStatusResponse) -> dict[str, Any]:
    """Every model with its instances, and what is wrong with the configuration file."""
    models = [as_dict(model) | {"instances": []} for model in status.models]
    by_name = {model["model"]: model for model in models}
    for instance in status.instances:
        if instance.model in by_name:  # one that was taken out of the configuration may still drain
            by_name[instance.model]["instances"].append(as_dict(instance))
    return {"models": models, "config_problems": list(status.config_problems)}


def models_table(status: pb.GetStatusResponse) -> str:
    """A row for each model: what it needs, where it runs, how it is used, and why it can't be had."""
    rows = [("MODEL", "STATE", "NEED", "DEVICES", "LEASES", "IDLE", "LOAD TIME", "PINNED", "NOTE")]
    for model in status.models:
        running = [instance for instance in status.instances if instance.model == model.model]
        rows.append((model.model, word(_STATES, model.state), _need(model), *_use(running), *_rest(model)))
    parts = [table(rows)] if status.models else ["no models"]
    if status.config_problems:
        parts.append("the configuration file is refused, the one before it is in effect:")
        parts += [f"  {problem}" for problem in status.config_problems]
    return "\n".join(parts)


def _need(model: pb.ModelStatus) -> str:
    return f"{size(model.need_mib)} {model.need_source}" if model.need_mib else model.need_source or "-"


def _use(instances: list[pb.InstanceStatus]) -> tuple[str, str, str]:
    """Devices, leases and idle time of a model's instances."""
    if not instances:
        return "-", "-", "-"
    devices = ", ".join("+".join(instance.device_ids) or "elsewhere" for instance in instances)
    leases = sum(instance.leases for instance in instances)
    idle = "-" if leases else duration(min(instance.idle_ms for instance in instances))
    return devices, str(leases), idle


def _rest(model: pb.ModelStatus) -> tuple[str, str, str]:
    load_time = duration(model.load_time_ms) if model.load_time_ms else "-"
    note = download_text(model.download) if model.HasField("download") else model.message
    if note and model.retry_after_ms:
        note += f" (again in {duration(model.retry_after_ms)})"
    return load_time, "yes" if model.pinned else "", note
