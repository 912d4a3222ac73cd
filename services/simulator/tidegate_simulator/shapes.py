"""Answers that must have a shape: the arguments of a tool, or JSON by a schema. Read in three dialects, and
filled in; which values stand in them is a function of the prompt and the seed alone, as with text."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidegate_simulator.errors import Refusal

_WORDS = ("harbour", "lock", "reed", "Möwe", "潮", "keel")
# Bytes of JSON that go out as one token, about.
_PIECE = re.compile(r"(?s).{1,6}")
_DEEPEST = 24


@dataclass(frozen=True, slots=True)
class Shape:
    """What an answer must look like."""

    schema: Mapping[str, Any]
    tool: str | None = None
    """The tool whose arguments the answer is; None: the answer itself is JSON."""
    named: bool = False
    """The caller named that one tool: vLLM then ends in `stop`, not in `tool_calls`."""

    def tokens(self, source: random.Random) -> list[str]:
        """The JSON, in pieces."""
        text = json.dumps(_Writer(self.schema, source).write(), ensure_ascii=False)
        return _PIECE.findall(text)


def of_chat(body: Mapping[str, Any]) -> Shape | None:
    """What a chat completion asks for: `tools` with `tool_choice`, or `response_format`. Raises Refusal."""
    tools = [
        (item["function"].get("name"), item["function"].get("parameters"))
        for item in _objects(body, "tools")
        if isinstance(item.get("function"), dict)
    ]
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, dict):
        choice = {"name": (choice.get("function") or {}).get("name")}
    called = _called(tools, choice, _last_said(body.get("messages")))
    return called or _format(body.get("response_format"), "json_schema")


def of_responses(body: Mapping[str, Any]) -> Shape | None:
    """What a Responses request asks for: `tools` with `tool_choice`, or `text.format`. Raises Refusal."""
    tools = [
        (item.get("name"), item.get("parameters"))
        for item in _objects(body, "tools")
        if item.get("type") == "function"
    ]
    text = body.get("text")
    called = _called(tools, body.get("tool_choice") or "auto", _last_said(body.get("input")))
    return called or _format(text.get("format") if isinstance(text, dict) else None, None)


def of_messages(body: Mapping[str, Any]) -> Shape | None:
    """What one of Anthropic's requests asks for: `tools` with `tool_choice`. Raises Refusal."""
    tools = [(item.get("name"), item.get("input_schema")) for item in _objects(body, "tools")]
    choice = body.get("tool_choice") or {}
    kind = choice.get("type", "auto") if isinstance(choice, dict) else "auto"
    wanted = {"any": "required", "tool": choice}.get(kind, kind)
    return _called(tools, wanted, _last_said(body.get("messages")))


def _called(tools: Sequence[tuple[Any, Any]], choice: Any, said: str) -> Shape | None:
    """The call of a tool, or None for a text. With `auto` it is the first tool that the caller's last words
    name: there is no model here to decide."""
    if choice == "none" or not tools:
        return None
    if isinstance(choice, dict):
        wanted = choice.get("name")
        found = next(((name, schema) for name, schema in tools if name == wanted), None)
        if found is None:
            raise Refusal(400, f"Tool '{wanted}' has not been passed in `tools`.", param="tool_choice")
        return Shape(_schema(found[1]), str(wanted), named=True)
    if choice == "required":
        return Shape(_schema(tools[0][1]), str(tools[0][0]))
    named = ((name, schema) for name, schema in tools if name and str(name) in said)
    return next((Shape(_schema(schema), str(name)) for name, schema in named), None)


def _format(given: Any, inside: str | None) -> Shape | None:
    """`json_object`, or `json_schema` with its schema in the field `inside`, where the dialect has one."""
    if not isinstance(given, dict):
        return None
    if given.get("type") == "json_object":
        return Shape({"type": "object"})
    if given.get("type") != "json_schema":
        return None
    holder = given.get(inside) if inside else given
    if not isinstance(holder, dict) or not isinstance(holder.get("schema"), dict):
        raise Refusal(400, "A json_schema needs a schema.", param="response_format")
    return Shape(holder["schema"])


def _schema(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, dict) else {"type": "object"}


def _objects(body: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    given = body.get(name)
    return [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []


def _last_said(messages: Any) -> str:
    """The caller's last words; none where a tool's result stands last."""
    if not isinstance(messages, list) or not messages:
        return str(messages or "")
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role", "user") != "user":
        return ""
    text = json.dumps(last.get("content"), ensure_ascii=False)
    return "" if '"tool_result"' in text or last.get("type") == "function_call_output" else text


class _Writer:
    """Writes a value that a JSON schema allows. Raises Refusal for a keyword that it can't keep."""

    def __init__(self, schema: Mapping[str, Any], source: random.Random) -> None:
        self._root = schema
        self._source = source

    def write(self) -> Any:
        """The value."""
        return self._value(self._root, 0)

    def _value(self, schema: Any, depth: int) -> Any:
        if schema is True or schema == {}:
            return "harbour"
        if not isinstance(schema, dict) or depth > _DEEPEST:
            raise Refusal(400, "The schema is not one that an answer can be made of.")
        if "$ref" in schema:
            return self._value(self._resolved(schema["$ref"]), depth + 1)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return self._source.choice(schema["enum"])
        for keyword in ("anyOf", "oneOf"):
            if schema.get(keyword):
                return self._value(schema[keyword][0], depth + 1)
        if schema.get("allOf"):
            merged: dict[str, Any] = {}
            for part in schema["allOf"]:
                merged |= self._resolved(part["$ref"]) if "$ref" in part else part
            return self._value(merged, depth + 1)
        return self._of_type(schema, depth)

    def _of_type(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type", "object" if "properties" in schema else "string")
        match kind[0] if isinstance(kind, list) else kind:
            case "object":
                return self._object(schema, depth)
            case "array":
                length = max(schema.get("minItems", 0), min(2, schema.get("maxItems", 2)))
                return [self._value(schema.get("items", True), depth + 1) for _ in range(length)]
            case "integer":
                return math.ceil(self._number(schema))
            case "number":
                return self._number(schema) + (0 if "maximum" in schema else 0.5)
            case "boolean":
                return self._source.random() < 0.5
            case "null":
                return None
            case "string" if "pattern" not in schema and "format" not in schema:
                return self._string(schema)
        raise Refusal(400, f"The simulator can't fill in {json.dumps(schema)[:200]}.")

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        wanted = [*properties, *(name for name in schema.get("required", []) if name not in properties)]
        return {name: self._value(properties.get(name, True), depth + 1) for name in wanted}

    def _number(self, schema: dict[str, Any]) -> float:
        least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
        most = schema.get("maximum", schema.get("exclusiveMaximum", least + 101) - 1)
        return self._source.randint(math.ceil(least), max(math.ceil(least), math.floor(most)))

    def _string(self, schema: dict[str, Any]) -> str:
        text = self._source.choice(_WORDS)
        while len(text) < schema.get("minLength", 0):
            text += " " + self._source.choice(_WORDS)
        return text[: schema.get("maxLength", len(text))]

    def _resolved(self, reference: Any) -> Any:
        found: Any = self._root
        try:
            for step in str(reference).removeprefix("#").strip("/").split("/"):
                found = found[step] if step else found
        except (KeyError, TypeError):
            raise Refusal(400, f"The schema has no {str(reference)[:100]}.") from None
        return found
