"""Anthropic's SDK for Python: messages, counting, models."""

from __future__ import annotations

from typing import Any

import anthropic
from anthropic import Anthropic
from runner import Facts, serve

TOOL: Any = {
    "name": "look_up",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"type": "string"}, "depth": {"type": "integer"}},
        "required": ["place", "depth"],
    },
}


def _client(
    url: str, key: str = "none", bearer: bool = False, retries: int = 0, timeout: float = 30
) -> Anthropic:
    """The key goes as `x-api-key`, or with `bearer` as `Authorization`."""
    credential: Any = {"auth_token": key} if bearer else {"api_key": key}
    return Anthropic(base_url=url, max_retries=retries, timeout=timeout, **credential)


def _messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


def _said(answer: Any) -> str:
    return "".join(block.text for block in answer.content if block.type == "text")


def chat(model: str, text: str, stream: bool = False, *, length: int = 8, **client: Any) -> Facts:
    """Messages."""
    asked: Any = {"model": model, "messages": _messages(text), "max_tokens": length}
    with _client(**client) as one:
        if not stream:
            answer = one.messages.create(**asked)
        else:
            with one.messages.stream(**asked) as events:
                said = "".join(events.text_stream)
                answer = events.get_final_message()
            assert said == _said(answer)
    return {
        "text": _said(answer),
        "model": answer.model,
        "finish": answer.stop_reason,
        "tokens": answer.usage.output_tokens,
    }


def count(model: str, text: str, **client: Any) -> Facts:
    """How many tokens a prompt has."""
    with _client(**client) as one:
        return {"tokens": one.messages.count_tokens(model=model, messages=_messages(text)).input_tokens}


def use_tool(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """A tool is used, then its result is sent back."""
    asked: Any = {"model": model, "max_tokens": 100, "tools": [TOOL]}
    first = asked | {"messages": _messages(text), "tool_choice": {"type": "any"}}
    with _client(**client) as one:
        if stream:
            with one.messages.stream(**first) as events:
                answer: Any = events.get_final_message()
        else:
            answer = one.messages.create(**first)
        (block,) = answer.content
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "high water"}
        turns = [
            *_messages(text),
            {"role": "assistant", "content": [block.to_dict()]},
            {"role": "user", "content": [result]},
        ]
        after = one.messages.create(messages=turns, **asked)
    assert answer.stop_reason == "tool_use"
    return {"tool": block.name, "arguments": block.input, "then": _said(after)}


def models(**client: Any) -> Facts:
    """The list of models."""
    with _client(**client) as one:
        return {"ids": [model.id for model in one.models.list()]}


def model(name: str, **client: Any) -> Facts:
    """One model."""
    with _client(**client) as one:
        return {"id": one.models.retrieve(name).id}


def read(dialect: str, model: str, text: str, **client: Any) -> Facts:
    """A stream is read to its end, whatever that is."""
    assert dialect == "message"
    seen: list[str] = []
    asked: Any = {"model": model, "messages": _messages(text), "max_tokens": 12, "stream": True}
    try:
        with _client(**client) as one:
            seen.extend(event.type for event in one.messages.create(**asked))
    except anthropic.APIError as error:
        return {"seen": seen, "raised": type(error).__name__, "message": str(error)}
    return {"seen": seen}


def leave(model: str, text: str, **client: Any) -> Facts:
    """A stream is left after its first piece; the client itself lives on."""
    one = _client(**client)
    stream = one.messages.create(model=model, messages=_messages(text), max_tokens=500, stream=True)
    next(iter(stream))
    stream.close()
    _left.append(one)
    return {}


_left: list[Anthropic] = []

if __name__ == "__main__":
    serve({one.__name__: one for one in (chat, count, use_tool, models, model, read, leave)})
