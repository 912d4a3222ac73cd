"""/v1/audio/transcriptions and /v1/audio/translations: a multipart form in, a text out."""

from __future__ import annotations

import hashlib
import time
from email import message_from_bytes
from email.message import Message
from typing import Any

from aiohttp import web

from tidegate_simulator.completions import prebuilt
from tidegate_simulator.engine import Work
from tidegate_simulator.errors import Refusal, json_response
from tidegate_simulator.state import Simulator, new_id
from tidegate_simulator.stream import EventStream, collected, frame, paced

# Of 16 kHz, 16 bit, one channel.
_BYTES_A_SECOND = 32000


async def transcriptions(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/audio/transcriptions."""
    return await _answer(simulator, request, "transcription")


async def translations(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/audio/translations."""
    return await _answer(simulator, request, "translation")


async def _answer(simulator: Simulator, request: web.Request, task: str) -> web.StreamResponse:
    fields = await form(request)
    file = fields.get("file")
    if file is None:
        raise Refusal(
            400, "[{'type': 'missing', 'loc': ('body', 'file'), 'msg': 'Field required'}]", param="file"
        )
    name = simulator.model(
        {key: value.decode("utf-8", "replace") for key, value in fields.items() if key == "model"}
    )
    plan = simulator.plan(f"{task} {hashlib.sha256(file).hexdigest()}", {})
    work = Work(plan.prompt_tokens)
    async with simulator.engine.slot(work):
        if fields.get("stream") in (b"true", b"True", b"1"):
            head = {
                "id": new_id(request, "trsc-"),
                "object": f"{task}.chunk",
                "created": int(time.time()),
                "model": name,
            }

            def chunk(text: str, reason: str | None = None) -> bytes:
                return frame(head | {"choices": [{"delta": {"content": text}, "finish_reason": reason}]})

            stream = EventStream(simulator, request)
            make = prebuilt(chunk)
            await stream.open()
            async for token in paced(simulator, work, plan):
                await stream.text(make, token)
            return await stream.close(chunk("", plan.finish_reason))
        said = await collected(simulator, request, work, plan)
    if fields.get("response_format") == b"text":
        return web.Response(text=said)
    answer: dict[str, Any] = {"text": said}
    if task == "transcription":
        answer["usage"] = {"type": "duration", "seconds": max(1, len(file) // _BYTES_A_SECOND)}
    return json_response(answer)


async def form(request: web.Request) -> dict[str, bytes]:
    """The form's fields as they came, byte for byte."""
    if request.content_type != "multipart/form-data":
        raise Refusal(
            400, "[{'type': 'missing', 'loc': ('body', 'file'), 'msg': 'Field required'}]", param="file"
        )
    head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
    form = message_from_bytes(head + await request.read())
    parts = form.get_payload()
    if not form.is_multipart() or not isinstance(parts, list):
        raise Refusal(400, "There was an error parsing the body")
    return {_name(part): _content(part) for part in parts if isinstance(part, Message)}


def _name(part: Message) -> str:
    return str(part.get_param("name", "", "content-disposition"))


def _content(part: Message) -> bytes:
    content = part.get_payload(decode=True)
    return content if isinstance(content, bytes) else b""
