"""OpenAI's Responses: create (whole, streamed, in the background), get, cancel."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from aiohttp import web

from tidegate_simulator import shapes
from tidegate_simulator.engine import Work
from tidegate_simulator.errors import Refusal, json_response
from tidegate_simulator.state import Simulator, read_object, required
from tidegate_simulator.stream import EventStream, collected, frame, paced
from tidegate_simulator.text import Plan, flatten

_KEPT = 100
# A task that nothing refers to may be collected before it ends.
_background: dict[str, asyncio.Task[None]] = {}


async def create(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/responses."""
    body = await read_object(request)
    name = simulator.model(body)
    prompt = f"{body.get('instructions') or ''}\n{_input(required(body, 'input', str, list))}"
    plan = simulator.plan(prompt, body, "max_output_tokens", shape=shapes.of_responses(body))
    work = Work(plan.prompt_tokens)
    answer = _empty(body, name)
    _store(simulator, answer)
    if body.get("background"):
        answer["status"] = "queued"
        _background[answer["id"]] = asyncio.create_task(_run(simulator, request, work, plan, answer))
        return json_response(answer)
    async with simulator.engine.slot(work):
        if body.get("stream"):
            return await _stream(simulator, request, work, plan, answer)
        said = await collected(simulator, request, work, plan)
    _finish(answer, plan, said, work)
    return json_response(answer)


async def get(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """GET /v1/responses/{id}."""
    return json_response(_find(simulator, request))


async def cancel(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/responses/{id}/cancel; only what runs in the background can be cancelled."""
    answer = _find(simulator, request)
    if not answer["background"]:
        raise Refusal(400, "Cannot cancel a synchronous response.", param="response_id")
    task = _background.get(answer["id"])
    if task is not None:
        task.cancel()
        answer["status"] = "cancelled"
    return json_response(answer)


async def _run(
    simulator: Simulator, request: web.Request, work: Work, plan: Plan, answer: dict[str, Any]
) -> None:
    try:
        async with simulator.engine.slot(work):
            answer["status"] = "in_progress"
            said = await collected(simulator, request, work, plan)
        _finish(answer, plan, said, work)
    except Refusal as refusal:
        answer["status"] = "failed"
        answer["error"] = {"code": "server_error", "message": refusal.message}
    finally:
        del _background[answer["id"]]


async def _stream(
    simulator: Simulator, request: web.Request, work: Work, plan: Plan, answer: dict[str, Any]
) -> web.StreamResponse:
    number = -1

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return frame({"type": kind, "sequence_number": number, **fields}, kind)

    item = _item(plan, "in_progress", None)
    where: dict[str, Any] = {"item_id": item["id"], "output_index": 0}
    stream = EventStream(simulator, request, named=True)
    await stream.open(
        event("response.created", response=answer),
        event("response.in_progress", response=answer),
        event("response.output_item.added", output_index=0, item=item),
    )
    kind, field = "response.function_call_arguments", "arguments"
    extra: dict[str, Any] = {}
    if plan.tool is None:
        kind, field = "response.output_text", "text"
        extra, where = {"logprobs": []}, where | {"content_index": 0}
        await stream.send(event("response.content_part.added", **where, part=_part("")))
    async for token in paced(simulator, work, plan):
        await stream.text(lambda text: event(f"{kind}.delta", **where, delta=text, **extra), token)
    done = _finish(answer, plan, plan.text, work, item["id"])
    ends = [event(f"{kind}.done", **where, **{field: plan.text}, **extra)]
    if plan.tool is None:
        ends.append(event("response.content_part.done", **where, part=_part(plan.text)))
    return await stream.close(
        *ends,
        event("response.output_item.done", output_index=0, item=done),
        event("response.completed", response=answer),
    )


def _finish(
    answer: dict[str, Any], plan: Plan, said: str, work: Work, item_id: str | None = None
) -> dict[str, Any]:
    item = _item(plan, "completed", said, item_id)
    cut = plan.finish_reason == "length"
    answer["status"] = "incomplete" if cut else "completed"
    answer["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
    answer["output"] = [item]
    answer["usage"] = {
        "input_tokens": plan.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": work.produced,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": plan.prompt_tokens + work.produced,
    }
    return item


def _empty(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": bool(body.get("background")),
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.get("metadata"),
        "model": name,
        "output": [],
        "parallel_tool_calls": True,
        "temperature": body.get("temperature", 1.0),
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools", []),
        "top_p": body.get("top_p", 1.0),
        "truncation": "disabled",
        "usage": None,
    }


def _item(plan: Plan, status: str, said: str | None, item_id: str | None = None) -> dict[str, Any]:
    """The one item of an answer: a message, or the call of a tool. `said` None: nothing yet."""
    if plan.tool is None:
        number = item_id or f"msg_{uuid.uuid4().hex}"
        content = [] if said is None else [_part(said)]
        return {"id": number, "type": "message", "role": "assistant", "status": status, "content": content}
    number = item_id or f"fc_{uuid.uuid4().hex}"
    return {
        "id": number,
        "type": "function_call",
        "call_id": f"call_{number.removeprefix('fc_')}",
        "name": plan.tool,
        "arguments": said or "",
        "status": status,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


def _input(given: str | list[Any]) -> str:
    if isinstance(given, str):
        return given
    return "\n".join(
        flatten(item.get("content", item)) if isinstance(item, dict) else str(item) for item in given
    )


def _store(simulator: Simulator, answer: dict[str, Any]) -> None:
    simulator.stored[answer["id"]] = answer
    while len(simulator.stored) > _KEPT:
        del simulator.stored[next(iter(simulator.stored))]


def _find(simulator: Simulator, request: web.Request) -> dict[str, Any]:
    wanted = request.match_info["id"]
    if wanted not in simulator.stored:
        raise Refusal(404, f"Response with id '{wanted}' not found.", param="response_id")
    return simulator.stored[wanted]
