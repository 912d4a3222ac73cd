"""What the handlers share, and what they ask of a request."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tidegate_simulator.engine import Engine
from tidegate_simulator.errors import Refusal
from tidegate_simulator.faults import Faults
from tidegate_simulator.journal import Journal
from tidegate_simulator.memory import Memory
from tidegate_simulator.options import Options
from tidegate_simulator.shapes import Shape
from tidegate_simulator.text import GIBBERISH, Plan, count_tokens, plan, source


@dataclass(slots=True)
class Simulator:
    """One pretended server."""

    options: Options
    engine: Engine
    faults: Faults
    memory: Memory
    die: Callable[[str], None]
    """Ends the process as a crash of the engine would, after printing that line."""
    journal: Journal = field(default_factory=Journal)
    loaded: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    stored: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Answers of /v1/responses by id, the last ones."""

    def model(self, body: dict[str, Any]) -> str:
        """The served name that the request means: the first where it names none. Raises Refusal."""
        name = body.get("model")
        if name is None or name == "":
            return self.options.names[0]
        if name not in self.options.names:
            raise Refusal(404, f"The model `{name}` does not exist.", param="model")
        return str(name)

    def plan(self, prompt: str, body: dict[str, Any], *limits: str, shape: Shape | None = None) -> Plan:
        """Decides the answer, as long as the first set field of `limits` says, or as long as its shape needs
        and no longer than that. Raises Refusal."""
        prompt_tokens = self.fitting(prompt)
        asked = next((limit for name in limits if (limit := whole(body, name, 1)) is not None), None)
        room = self.options.max_model_len - prompt_tokens
        if asked is not None and asked > room:
            raise Refusal(
                400,
                f"This model's maximum context length is {self.options.max_model_len} tokens. However, you "
                f"requested {asked} output tokens and your prompt contains {prompt_tokens} input tokens, for "
                f"a total of {asked + prompt_tokens} tokens. Please reduce the length of the input prompt or "
                "the number of requested output tokens.",
                param=limits[0],
            )
        if shape is not None:
            return _shaped(prompt, prompt_tokens, body, shape, room if asked is None else asked)
        length = min(self.options.default_tokens, room) if asked is None else asked
        stop = body.get("stop", body.get("stop_sequences")) or []
        decided = plan(
            prompt,
            seed=body.get("seed"),
            length=length,
            limited=asked is not None or length == room,
            stop=[stop] if isinstance(stop, str) else stop,
        )
        if not self.engine.weights_valid:
            decided.tokens = [GIBBERISH] * len(decided.tokens)
        return decided

    def fitting(self, prompt: str) -> int:
        """The prompt's tokens. Raises Refusal where there's no room for it and one token more."""
        tokens = count_tokens(prompt)
        if tokens >= self.options.max_model_len:
            raise Refusal(
                400,
                f"This model's maximum context length is {self.options.max_model_len} tokens. However, your "
                f"request has {tokens} input tokens. Please reduce the length of the input messages.",
                param="input_tokens",
            )
        return tokens


def _shaped(prompt: str, prompt_tokens: int, body: dict[str, Any], shape: Shape, most: int) -> Plan:
    tokens = shape.tokens(source(prompt, body.get("seed")))
    reason = "tool_calls" if shape.tool is not None and not shape.named else "stop"
    return Plan(prompt_tokens, tokens[:most], "length" if len(tokens) > most else reason, shape.tool)


SIMULATOR = web.AppKey("simulator", Simulator)


async def read_object(request: web.Request) -> dict[str, Any]:
    """The request's JSON object. Raises Refusal as vLLM does for another type, bad JSON, or no object."""
    if request.content_type not in ("application/json", "application/octet-stream", ""):
        raise Refusal(415, "Unsupported Media Type: Only 'application/json' is allowed")
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise Refusal(
            400, f"[{{'type': 'json_invalid', 'loc': ('body',), 'msg': 'JSON decode error: {error}'}}]"
        ) from None
    if not isinstance(body, dict):
        raise Refusal(
            400, "[{'type': 'model_attributes_type', 'loc': ('body',), 'msg': 'Input should be an object'}]"
        )
    return body


def required(body: dict[str, Any], name: str, *kinds: type) -> Any:
    """A field that must be there, of one of those types. Raises Refusal."""
    value = body.get(name)
    if value is None:
        raise Refusal(
            400, f"[{{'type': 'missing', 'loc': ('body', '{name}'), 'msg': 'Field required'}}]", param=name
        )
    if kinds and not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise Refusal(
            400,
            f"[{{'type': 'type_error', 'loc': ('body', '{name}'), 'msg': 'Input should be a {wanted}'}}]",
            param=name,
        )
    return value


def whole(body: dict[str, Any], name: str, least: int) -> int | None:
    """A whole number that may be left out. Raises Refusal for another type or a smaller number."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise Refusal(400, f"{name} must be an integer of at least {least}, got {value!r}.", param=name)
    return value


def new_id(request: web.Request, prefix: str) -> str:
    """An answer's id: the caller's X-Request-Id behind the prefix, or a new one."""
    return f"{prefix}{request.headers.get('X-Request-Id') or uuid.uuid4().hex}"


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """OpenAI's account of tokens."""
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None,
    }
