"""Tools and JSON by a schema, in the three dialects, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.simulator.conftest import Simulated

PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 12},
        "kind": {"enum": ["lock", "gate"]},
        "depth": {"type": "integer", "minimum": 3, "maximum": 5},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1},
        "note": {"anyOf": [{"type": "null"}, {"type": "string"}]},
    },
    "required": ["name", "kind", "depth", "tags", "note"],
    "$defs": {"tag": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}},
}
FUNCTION = {"name": "look_up", "parameters": PLACE}
ASK: dict[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": "use look_up for the tide"}],
}


@pytest.fixture(scope="module")
def client(shared: Simulated) -> Iterator[openai.OpenAI]:
    """openai-python, pointed at the shared simulator."""
    with openai.OpenAI(base_url=shared.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def _is_a_place(text: str) -> None:
    place = json.loads(text)
    assert set(place) == set(PLACE["properties"])
    assert len(place["name"]) >= 12
    assert place["kind"] in ("lock", "gate")
    assert 3 <= place["depth"] <= 5
    assert [set(tag) for tag in place["tags"]] == [{"on"}] * len(place["tags"])
    assert place["note"] is None


@pytest.mark.parametrize(
    ("choice", "finish"),
    [
        ({"type": "function", "function": {"name": "look_up"}}, "stop"),
        ("required", "tool_calls"),
        ("auto", "tool_calls"),
    ],
)
def test_a_chat_calls_a_tool(client: openai.OpenAI, choice: Any, finish: str) -> None:
    """Named, required, or told in the last words: one call, with arguments that the schema allows."""
    tools: Any = [{"type": "function", "function": FUNCTION}]
    answer = client.chat.completions.create(**ASK, tools=tools, tool_choice=choice).choices[0]
    calls: Any = answer.message.tool_calls
    assert [call.function.name for call in calls] == ["look_up"]
    assert answer.message.content is None
    assert answer.finish_reason == finish
    _is_a_place(calls[0].function.arguments)
    stream: Any = client.chat.completions.create(**ASK, tools=tools, tool_choice=choice, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    parts = [delta.tool_calls[0].function for delta in deltas if delta.tool_calls]
    assert parts[0].name == "look_up"
    assert "".join(part.arguments for part in parts) == calls[0].function.arguments


def test_a_tools_result_is_answered_in_words(client: openai.OpenAI) -> None:
    """With `auto` nothing is called where no tool is named, nor after a result; an unknown choice is 400."""
    tools: Any = [{"type": "function", "function": FUNCTION}]
    result = {"role": "tool", "tool_call_id": "1", "content": "look_up said high"}
    messages: Any = [*ASK["messages"], result]
    after = client.chat.completions.create(model="small", messages=messages, tools=tools)
    none = client.chat.completions.create(**ASK, tools=tools, tool_choice="none")
    assert after.choices[0].message.content
    assert none.choices[0].message.content
    other: Any = {"type": "function", "function": {"name": "other"}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**ASK, tools=tools, tool_choice=other)


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    """response_format and text.format give JSON that the schema allows; max_tokens cuts it short."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    chat = client.chat.completions.create(**ASK, response_format=form).choices[0]
    _is_a_place(chat.message.content or "")
    assert chat.finish_reason == "stop"
    short = client.chat.completions.create(**ASK, response_format=form, max_tokens=2).choices[0]
    assert short.finish_reason == "length"
    flat: Any = {"format": {"type": "json_schema", "name": "place", "schema": PLACE}}
    _is_a_place(client.responses.create(model="small", input="a", text=flat).output_text)


def test_a_schema_that_cannot_be_filled_in_is_refused(client: openai.OpenAI) -> None:
    """What the simulator can't promise it doesn't pretend: a pattern, or a reference to nothing, is 400."""
    for schema in ({"type": "string", "pattern": "^a+$"}, {"$ref": "#/$defs/none"}):
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ASK, response_format=form)


def test_responses_call_a_tool(client: openai.OpenAI) -> None:
    """The item is a function call; its stream says the arguments piece by piece and whole."""
    tools: Any = [{"type": "function", "strict": True, **FUNCTION}]
    answer = client.responses.create(model="small", input="x", tools=tools, tool_choice="required")
    item: Any = answer.output[0]
    assert (item.type, item.name, item.status) == ("function_call", "look_up", "completed")
    _is_a_place(item.arguments)
    with client.responses.stream(model="small", input="x", tools=tools, tool_choice="required") as stream:
        events: list[Any] = list(stream)
        final: Any = stream.get_final_response().output[0]
    said = "".join(event.delta for event in events if event.type.endswith("arguments.delta"))
    assert said == final.arguments == item.arguments
    assert next(event for event in events if event.type.endswith("arguments.done")).arguments == said


def test_messages_use_a_tool(shared: Simulated) -> None:
    """Anthropic's dialect: a block with the input, stop_reason tool_use; streamed as partial JSON."""
    body = {
        "model": "small",
        "max_tokens": 90,
        "messages": ASK["messages"],
        "tools": [{"name": "look_up", "input_schema": PLACE}],
        "tool_choice": {"type": "any"},
    }
    answer = shared.http.post("/v1/messages", json=body).json()
    (block,) = answer["content"]
    assert (block["type"], block["name"], answer["stop_reason"]) == ("tool_use", "look_up", "tool_use")
    _is_a_place(json.dumps(block["input"]))
    frames = shared.http.post("/v1/messages", json=body | {"stream": True}).text.split("\n\n")
    events = [json.loads(frame.partition("data: ")[2]) for frame in frames if frame]
    said = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(said)) == block["input"]
    named = body | {"tool_choice": {"type": "tool", "name": "look_up"}}
    assert shared.http.post("/v1/messages", json=named).json()["stop_reason"] == "tool_use"
