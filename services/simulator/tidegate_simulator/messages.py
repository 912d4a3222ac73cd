"""Anthropic's routes: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
import uuid
from typing import Any

from aiohttp import web

from tidegate_simulator import shapes
from tidegate_simulator.completions import prebuilt
from tidegate_simulator.engine import Work
from tidegate_simulator.errors import json_response
from tidegate_simulator.state import Simulator, new_id, read_object, required
from tidegate_simulator.stream import EventStream, collected, frame, paced
from tidegate_simulator.text import Plan, count_tokens, flatten, render

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "abort": "end_turn"}


async def messages(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/messages."""
    body = await read_object(request)
    name = simulator.model(body)
    prompt = _prompt(body)
    required(body, "max_tokens", int)
    plan = simulator.plan(prompt, body, "max_tokens", shape=shapes.of_messages(body))
    work = Work(plan.prompt_tokens)
    head = {"id": new_id(request, "msg_"), "type": "message", "role": "assistant", "model": name}
    async with simulator.engine.slot(work):
        if body.get("stream"):
            return await _stream(simulator, request, work, plan, head)
        said = await collected(simulator, request, work, plan)
    return json_response(
        head
        | {
            "content": [_block(plan, said)],
            "stop_reason": _stop_reason(plan),
            "stop_sequence": None,
            "usage": {"input_tokens": plan.prompt_tokens, "output_tokens": work.produced},
        }
    )


async def count(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/messages/count_tokens."""
    body = await read_object(request)
    simulator.model(body)
    return json_response({"input_tokens": count_tokens(_prompt(body))})


async def _stream(
    simulator: Simulator, request: web.Request, work: Work, plan: Plan, head: dict[str, Any]
) -> web.StreamResponse:
    started = head | {
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": plan.prompt_tokens, "output_tokens": 0},
    }
    stream = EventStream(simulator, request, named=True)
    make = prebuilt(
        lambda text: _event("content_block_delta", index=0, delta=_delta(plan, text)),
    )
    await stream.open(
        _event("message_start", message=started),
        _event("content_block_start", index=0, content_block=_block(plan, "")),
    )
    async for token in paced(simulator, work, plan):
        await stream.text(make, token)
    return await stream.close(
        _event("content_block_stop", index=0),
        _event(
            "message_delta",
            delta={"stop_reason": _stop_reason(plan), "stop_sequence": None},
            usage={"input_tokens": plan.prompt_tokens, "output_tokens": work.produced},
        ),
        _event("message_stop"),
    )


def _block(plan: Plan, said: str) -> dict[str, Any]:
    if plan.tool is None:
        return {"type": "text", "text": said}
    try:
        arguments = json.loads(said or "{}")
    except ValueError:  # max_tokens cut it short
        arguments = {}
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": plan.tool, "input": arguments}


def _delta(plan: Plan, text: str) -> dict[str, str]:
    if plan.tool is None:
        return {"type": "text_delta", "text": text}
    return {"type": "input_json_delta", "partial_json": text}


def _stop_reason(plan: Plan) -> str:
    # Anthropic's dialect makes no difference between a tool that was named and one that was chosen.
    finished = plan.tool is not None and plan.finish_reason == "stop"
    return "tool_use" if finished else _STOP_REASONS[plan.finish_reason]


def _event(kind: str, **fields: Any) -> bytes:
    return frame({"type": kind, **fields}, kind)


def _prompt(body: dict[str, Any]) -> str:
    return f"{flatten(body.get('system'))}\n{render(required(body, 'messages', list))}"
