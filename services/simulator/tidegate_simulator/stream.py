"""Answers given piece by piece: the pace, the frames, and the faults that strike among them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from tidegate_simulator.engine import Work
from tidegate_simulator.errors import anthropic_body, error_body
from tidegate_simulator.sabotage import TORN_CHARACTER, cut, die, forever, within_whole_answer
from tidegate_simulator.state import Simulator
from tidegate_simulator.text import Plan

DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
# Without a pace there is nothing to wait for; the loop still gets its turn after so many tokens.
_TOKENS_A_TURN = 32
_ENGINE_ISSUE = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class Ended(Exception):
    """The stream was ended by a fault, in good order: nothing is left to send."""

    def __init__(self, response: web.StreamResponse) -> None:
        super().__init__()
        self.response = response


def frame(data: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if event is None else b"event: %b\n" % event.encode()
    return head + b"data: %b\n\n" % json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


class EventStream:
    """A stream of server-sent events to one client.

    `named` says that its events have names, as in Responses and Anthropic's Messages: such a stream has no
    `[DONE]`.
    """

    def __init__(self, simulator: Simulator, request: web.Request, *, named: bool = False) -> None:
        self._faults = simulator.faults
        self._request = request
        self._named = named
        self._sent = 0
        self.response = web.StreamResponse(headers=_HEADERS)

    async def open(self, *frames: bytes) -> None:
        """Sends the headers and the frames that come before any text."""
        await self.response.prepare(self._request)
        await self.send(*frames)

    async def send(self, *frames: bytes) -> None:
        """Sends frames without text."""
        if frames:
            await self.response.write(b"".join(frames))

    async def text(self, make: Callable[[str], bytes], token: str) -> None:
        """Sends the frame of a piece of text; a fault may strike in its place."""
        fault = self._faults.at_chunk(self._request.path, self._sent)
        if fault is not None:
            await self._strike(fault.fault, make)
        self._sent += 1
        await self.response.write(make(token))

    async def close(self, *frames: bytes) -> web.StreamResponse:
        """Sends the last frames, and `[DONE]` where the dialect has one; `no-done` drops the last."""
        last = list(frames) if self._named else [*frames, DONE]
        if self._faults.at_end(self._request.path) is not None:
            last.pop()
        await self.send(*last)
        await self.response.write_eof()
        return self.response

    async def _strike(self, fault: str, make: Callable[[str], bytes]) -> None:
        match fault:
            case "die-after":
                die()
            case "stall-after":
                await forever()
            case "error-after":
                await self._say_error()
                raise Ended(self.response)
            case "mid-utf8":
                whole = make(TORN_CHARACTER)
                await self.response.write(whole[: whole.index(TORN_CHARACTER.encode()) + 1])
                cut(self._request)
            case _:
                cut(self._request)

    async def _say_error(self) -> None:
        if self._request.path == "/v1/messages":
            await self.send(frame(anthropic_body(500, _ENGINE_ISSUE), "error"))
        elif self._named:
            await self.send(
                frame({"type": "error", "code": "500", "message": _ENGINE_ISSUE, "param": None}, "error")
            )
        else:
            await self.send(frame(error_body(500, _ENGINE_ISSUE)), DONE)
        await self.response.write_eof()


async def paced(simulator: Simulator, work: Work, plan: Plan) -> AsyncIterator[str]:
    """The plan's tokens, each when it is due: the first after --ttft, the others at --token-rate.

    Ends early, with the plan's finish_reason `abort`, where the engine drops the work.
    """
    options, loop = simulator.options, asyncio.get_running_loop()
    interval = 1 / options.token_rate if options.token_rate else 0.0
    begin = loop.time() + options.ttft
    for number, token in enumerate(plan.tokens):
        delay = begin + number * interval - loop.time()
        if delay > 0:
            await work.pause(delay)
        elif number % _TOKENS_A_TURN == 0:
            await asyncio.sleep(0)
        await simulator.engine.thawed()
        if work.aborted:
            _abort(plan, number)
            break
        if number == 0:
            simulator.engine.first_token.observe(loop.time() - begin + options.ttft)
        work.produced += 1
        yield token
    work.reason = plan.finish_reason


async def collected(simulator: Simulator, request: web.Request, work: Work, plan: Plan) -> str:
    """The whole answer when it is due. One timer where nothing is to be watched between the tokens."""
    options = simulator.options
    if simulator.faults.any_at_chunks():
        sent = 0
        async for _ in paced(simulator, work, plan):
            fault = simulator.faults.at_chunk(request.path, sent)
            if fault is not None:
                await within_whole_answer(fault, request)
            sent += 1
        return plan.text
    length = len(plan.tokens)
    interval = 1 / options.token_rate if options.token_rate else 0.0
    await work.pause(options.ttft + interval * max(0, length - 1))
    await simulator.engine.thawed()
    if work.aborted:
        ran = asyncio.get_running_loop().time() - work.started - options.ttft
        _abort(plan, min(length, max(0, int(ran / interval) + 1 if interval and ran > 0 else 0)))
    work.produced += len(plan.tokens)
    simulator.engine.first_token.observe(options.ttft)
    work.reason = plan.finish_reason
    return plan.text


def _abort(plan: Plan, produced: int) -> None:
    del plan.tokens[produced:]
    plan.finish_reason = "abort"
