"""Routes that don't run the model: health, models, metrics, sleep, and the simulator's own."""

from __future__ import annotations

import os
from typing import Any

from aiohttp import web

from tidegate_simulator.engine import TAGS
from tidegate_simulator.errors import Refusal, json_response
from tidegate_simulator.faults import fault_from
from tidegate_simulator.logs import say
from tidegate_simulator.memory import TooLittleMemory
from tidegate_simulator.metrics import exposition
from tidegate_simulator.sizes import gib
from tidegate_simulator.state import Simulator, read_object

VERSION = "0.33.0"
"""The release of vLLM that is looked like."""


async def health(simulator: Simulator, _request: web.Request) -> web.StreamResponse:
    """GET /health: 200 while asleep too."""
    return web.Response(status=503 if simulator.faults.unhealthy() else 200)


async def version(_simulator: Simulator, _request: web.Request) -> web.StreamResponse:
    """GET /version."""
    return json_response({"version": VERSION})


async def load(simulator: Simulator, _request: web.Request) -> web.StreamResponse:
    """GET /load."""
    return json_response({"server_load": len(simulator.engine.running) + len(simulator.engine.waiting)})


async def models(simulator: Simulator, _request: web.Request) -> web.StreamResponse:
    """GET /v1/models."""
    cards: list[dict[str, Any]] = [
        {
            "id": name,
            "object": "model",
            "created": simulator.created,
            "owned_by": "vllm",
            "root": simulator.options.model,
            "parent": None,
            "max_model_len": simulator.options.max_model_len,
            "permission": [],
        }
        for name in simulator.options.names
    ]
    return json_response({"object": "list", "data": cards})


async def metrics(simulator: Simulator, _request: web.Request) -> web.StreamResponse:
    """GET /metrics."""
    return web.Response(
        body=exposition(simulator).encode(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


async def sleep(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /sleep?level=0|1|2&mode=abort|wait|keep."""
    level, mode = request.query.get("level", "1"), request.query.get("mode", "abort")
    if level not in ("0", "1", "2") or mode not in ("abort", "wait", "keep"):
        raise Refusal(400, f"no sleep of level {level!r} and mode {mode!r}")
    await simulator.engine.sleep(int(level), mode)
    if simulator.engine.sleeping:
        before = simulator.memory.held_mib
        simulator.memory.hold(simulator.memory.sleeping_mib(simulator.engine.asleep_tags))
        now = simulator.memory.held_mib
        say(f"Sleep mode freed {gib(before - now)} GiB memory, {gib(now)} GiB memory is still in use.")
    return json_response({"status": "sleeping", "level": int(level)})


async def wake_up(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /wake_up[?tags=weights&tags=kv_cache].

    Where the memory has been taken meanwhile the engine crashes, as vLLM's does: 500, and the process ends.
    """
    tags = frozenset(request.query.getall("tags", sorted(TAGS)))
    if not tags <= TAGS:
        raise Refusal(400, f"no such tags: {', '.join(sorted(tags - TAGS))}")
    asleep = simulator.engine.asleep_tags - tags
    try:
        simulator.memory.hold(simulator.memory.sleeping_mib(asleep) if asleep else simulator.memory.whole_mib)
    except TooLittleMemory as error:
        simulator.die(str(error))
        raise Refusal(500, f"EngineDeadError: {error}") from error
    await simulator.engine.wake(tags)
    return json_response({"status": "sleeping" if simulator.engine.sleeping else "awake"})


async def is_sleeping(simulator: Simulator, _request: web.Request) -> web.StreamResponse:
    """GET /is_sleeping."""
    return json_response({"is_sleeping": simulator.engine.sleeping})


async def collective_rpc(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /collective_rpc; `reload_weights` ends the gibberish after a sleep of level 2."""
    body = await read_object(request)
    if body.get("method") is None:
        raise Refusal(400, "Missing 'method' in request body")
    if body["method"] == "reload_weights":
        simulator.engine.weights_valid = True
    return json_response({"results": [None]})


async def requests(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """GET /simulator/requests[?path=P]: what arrived, and what runs and waits now."""
    return json_response(
        {
            "pid": os.getpid(),
            "running": len(simulator.engine.running),
            "waiting": len(simulator.engine.waiting),
            "requests": simulator.journal.entries(request.query.get("path")),
        }
    )


async def forget_requests(simulator: Simulator, _request: web.Request) -> web.StreamResponse:
    """DELETE /simulator/requests."""
    simulator.journal.clear()
    return json_response({})


async def faults(simulator: Simulator, _request: web.Request) -> web.StreamResponse:
    """GET /simulator/faults."""
    return json_response({"faults": simulator.faults.snapshot()})


async def add_fault(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /simulator/faults: adds one; it strikes from the next request on."""
    try:
        simulator.faults.add(fault_from(await read_object(request)))
    except ValueError as error:
        raise Refusal(400, str(error)) from error
    return json_response({"faults": simulator.faults.snapshot()})


async def clear_faults(simulator: Simulator, _request: web.Request) -> web.StreamResponse:
    """DELETE /simulator/faults."""
    simulator.faults.clear()
    return json_response({"faults": []})
