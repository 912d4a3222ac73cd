"""What vLLM-Omni serves beside vLLM's routes: speech from text, and images."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
import time
import zlib
from typing import Any

from aiohttp import web

from tidegate_simulator.audio import form
from tidegate_simulator.engine import Work
from tidegate_simulator.errors import Refusal, json_response
from tidegate_simulator.state import Simulator, read_object, required, whole
from tidegate_simulator.stream import collected, paced
from tidegate_simulator.text import Plan

_RATE = 24000
"""Samples of 16 bit a second, one channel."""
_SAMPLES_A_TOKEN = 480
_SPEECH = {"wav": "audio/wav", "pcm": "audio/pcm"}
_SIZE = re.compile(r"([1-9]\d{1,3})x([1-9]\d{1,3})")
_MOST_IMAGES = 10


async def speech(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/audio/speech: a tone, 20 ms for each token of the text, sent as it is made. There are no
    encoders here, so only `wav` and `pcm`."""
    body = await read_object(request)
    simulator.model(body)
    said = required(body, "input", str)
    kind = body.get("response_format") or "wav"
    if kind not in _SPEECH:
        raise Refusal(400, f"response_format must be wav or pcm, got {kind!r}.", param="response_format")
    tokens = simulator.fitting(said)
    work = Work(tokens)
    async with simulator.engine.slot(work):
        response = web.StreamResponse(headers={"Content-Type": _SPEECH[kind]})
        await response.prepare(request)
        if kind == "wav":
            await response.write(_wav_head(2 * _SAMPLES_A_TOKEN * tokens))
        async for piece in paced(simulator, work, Plan(tokens, _tones(said, tokens), "stop")):
            await response.write(piece.encode("latin-1"))
        await response.write_eof()
    return response


async def generate(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/images/generations."""
    return await _images(simulator, request, await read_object(request))


async def edit(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/images/edits: a multipart form with one image or more."""
    fields = await form(request)
    images = [content for name, content in fields.items() if name in ("image", "image[]")]
    if not images:
        raise Refusal(
            400, "[{'type': 'missing', 'loc': ('body', 'image'), 'msg': 'Field required'}]", param="image"
        )
    body: dict[str, Any] = {name: value.decode("utf-8", "replace") for name, value in fields.items()}
    if str(body.get("n", "")).isdigit():
        body["n"] = int(body["n"])
    return await _images(simulator, request, body, b"".join(images))


async def _images(
    simulator: Simulator, request: web.Request, body: dict[str, Any], before: bytes = b""
) -> web.StreamResponse:
    simulator.model(body)
    prompt = required(body, "prompt", str)
    number = whole(body, "n", 1) or 1
    size = _SIZE.fullmatch(body.get("size") or "1024x1024")
    if size is None or number > _MOST_IMAGES:
        raise Refusal(400, f"n is at most {_MOST_IMAGES}, and size WIDTHxHEIGHT.", param="size")
    if (body.get("response_format") or "b64_json") != "b64_json":
        raise Refusal(400, "Only response_format 'b64_json' is supported.", param="response_format")
    tokens = simulator.fitting(prompt)
    work = Work(tokens)
    async with simulator.engine.slot(work):
        await collected(simulator, request, work, Plan(tokens, [""] * number, "stop"))
    data = []
    for index in range(number):
        colour = hashlib.sha256(b"%d\0%b\0%b" % (index, before, prompt.encode())).digest()[:3]
        png = _png(int(size[1]), int(size[2]), colour)
        data.append({"b64_json": base64.b64encode(png).decode(), "url": None, "revised_prompt": None})
    return json_response({"created": int(time.time()), "data": data})


def _tones(said: str, tokens: int) -> list[str]:
    """Samples as Latin-1 text, as tokens are text: a square wave whose pitch hangs on what is said."""
    half = 20 + hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()[0] % 100
    wave = [6000 if at // half % 2 else -6000 for at in range(_SAMPLES_A_TOKEN)]
    return [struct.pack(f"<{_SAMPLES_A_TOKEN}h", *wave).decode("latin-1")] * tokens


def _wav_head(length: int) -> bytes:
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, _RATE, 2 * _RATE, 2, 16)
    return (
        struct.pack("<4sI4s", b"RIFF", 36 + length, b"WAVE") + layout + struct.pack("<4sI", b"data", length)
    )


def _png(width: int, height: int, colour: bytes) -> bytes:
    """A picture of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + colour * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            chunk(b"IDAT", zlib.compress(rows, 1)),
            chunk(b"IEND", b""),
        )
    )
