"""/v1/chat/completions and /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from aiohttp import web

from tidegate_simulator import shapes
from tidegate_simulator.engine import Work
from tidegate_simulator.errors import Refusal, json_response
from tidegate_simulator.state import Simulator, new_id, read_object, required, usage
from tidegate_simulator.stream import EventStream, collected, frame, paced
from tidegate_simulator.text import Plan, decode, quoted, render


async def chat(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    body = await read_object(request)
    name = simulator.model(body)
    prompt = render(required(body, "messages", list))
    plan = simulator.plan(prompt, body, "max_completion_tokens", "max_tokens", shape=shapes.of_chat(body))
    work = Work(plan.prompt_tokens)
    head = {
        "id": new_id(request, "chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
    }
    async with simulator.engine.slot(work):
        if body.get("stream"):
            return await _stream_chat(simulator, request, work, plan, head, _wants_usage(simulator, body))
        said = await collected(simulator, request, work, plan)
    message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None, "tool_calls": []}
    if plan.tool is not None:
        message |= {"content": None, "tool_calls": [_call(plan.tool, said)]}
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": plan.finish_reason,
        "stop_reason": None,
    }
    return json_response(head | {"choices": [choice], "usage": usage(plan.prompt_tokens, work.produced)})


async def _stream_chat(
    simulator: Simulator, request: web.Request, work: Work, plan: Plan, head: dict[str, Any], with_usage: bool
) -> web.StreamResponse:
    head = head | {"object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        return frame(
            head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
        )

    def arguments(text: str) -> bytes:
        return chunk({"tool_calls": [{"index": 0, "function": {"arguments": text}}]})

    make = prebuilt((lambda text: chunk({"content": text})) if plan.tool is None else arguments)
    stream = EventStream(simulator, request)
    await stream.open(chunk({"role": "assistant", "content": ""}))
    if plan.tool is not None:
        await stream.send(chunk({"tool_calls": [{"index": 0, **_call(plan.tool, "")}]}))
    async for token in paced(simulator, work, plan):
        await stream.text(make, token)
    last = [chunk({"content": ""}, plan.finish_reason)]
    if with_usage:
        last.append(frame(head | {"choices": [], "usage": usage(plan.prompt_tokens, work.produced)}))
    return await stream.close(*last)


async def completions(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/completions. Several prompts run one after another in one slot."""
    body = await read_object(request)
    name = simulator.model(body)
    plans = [
        simulator.plan(prompt, body, "max_tokens") for prompt in _prompts(required(body, "prompt", str, list))
    ]
    work = Work(sum(plan.prompt_tokens for plan in plans))
    head = {
        "id": new_id(request, "cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": name,
    }
    async with simulator.engine.slot(work):
        if body.get("stream"):
            return await _stream_text(simulator, request, work, plans, head, _wants_usage(simulator, body))
        choices = []
        for index, plan in enumerate(plans):
            said = await collected(simulator, request, work, plan)
            choices.append(_choice(index, said, plan.finish_reason))
    produced = sum(len(plan.tokens) for plan in plans)
    return json_response(head | {"choices": choices, "usage": usage(work.prompt_tokens, produced)})


async def _stream_text(
    simulator: Simulator,
    request: web.Request,
    work: Work,
    plans: list[Plan],
    head: dict[str, Any],
    with_usage: bool,
) -> web.StreamResponse:
    stream = EventStream(simulator, request)
    await stream.open()
    for index, plan in enumerate(plans):
        make = prebuilt(partial(_text_chunk, head, index))
        async for token in paced(simulator, work, plan):
            await stream.text(make, token)
        await stream.send(_text_chunk(head, index, "", plan.finish_reason))
    last = []
    if with_usage:
        produced = sum(len(plan.tokens) for plan in plans)
        last.append(frame(head | {"choices": [], "usage": usage(work.prompt_tokens, produced)}))
    return await stream.close(*last)


def _call(tool: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-tool-{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": tool, "arguments": arguments},
    }


def prebuilt(make: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """A frame maker that serialises the frame once: after that only the text inside it changes."""
    mark = "\x00text\x00"
    before, after = make(mark).split(quoted(mark))
    return lambda text: before + quoted(text) + after


def _text_chunk(head: dict[str, Any], index: int, text: str, reason: str | None = None) -> bytes:
    return frame(head | {"choices": [_choice(index, text, reason)]})


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}


def _prompts(prompt: str | list[Any]) -> list[str]:
    """A prompt is a text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(item, int) for item in prompt):
        return [decode(prompt)]
    if not prompt or not all(isinstance(item, str | list) for item in prompt):
        raise Refusal(400, "prompt must be a text, token ids, or a list of either.", param="prompt")
    return [item if isinstance(item, str) else decode(item) for item in prompt]


def _wants_usage(simulator: Simulator, body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    asked = isinstance(options, dict) and bool(options.get("include_usage"))
    return asked or simulator.options.force_usage
