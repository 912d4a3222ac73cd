"""openai-python: every route it has. The same program for the releases on httpx2 and on httpx."""

from __future__ import annotations

import base64
import json
from typing import Any

import openai
from openai import OpenAI
from pydantic import BaseModel
from runner import Facts, digest, serve

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "depth": {"type": "integer"}},
            "required": ["place", "depth"],
            "additionalProperties": False,
        },
    },
}


class Place(BaseModel):
    """What a structured answer is."""

    name: str
    depth: int


def _client(url: str, key: str = "none", retries: int = 0, timeout: float = 30) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries, timeout=timeout)


def _messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


def chat(model: str, text: str, stream: bool = False, *, length: int | None = None, **client: Any) -> Facts:
    """Chat completions."""
    limits: Any = {} if length is None else {"max_tokens": length}
    with _client(**client) as one:
        if not stream:
            answer = one.chat.completions.create(model=model, messages=_messages(text), **limits)
            said, used = answer.choices[0].message.content, answer.usage
            finish, named = answer.choices[0].finish_reason, answer.model
        else:
            options: Any = {"stream": True, "stream_options": {"include_usage": True}}
            chunks = list(
                one.chat.completions.create(model=model, messages=_messages(text), **limits, **options)
            )
            choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
            said = "".join(choice.delta.content or "" for choice in choices)
            used, finish, named = chunks[-1].usage, choices[-1].finish_reason, chunks[0].model
    assert used is not None
    return {"text": said, "model": named, "finish": finish, "tokens": used.completion_tokens}


def complete(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """Completions."""
    with _client(**client) as one:
        if not stream:
            return {"text": one.completions.create(model=model, prompt=text).choices[0].text}
        chunks = one.completions.create(model=model, prompt=text, stream=True)
        return {"text": "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)}


def embed(model: str, texts: list[str], **client: Any) -> Facts:
    """Embeddings, which this client asks for in base64."""
    with _client(**client) as one:
        return {"vectors": [item.embedding for item in one.embeddings.create(model=model, input=texts).data]}


def respond(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """Responses."""
    with _client(**client) as one:
        if not stream:
            answer = one.responses.create(model=model, input=text)
            return {"text": answer.output_text, "state": answer.status, "id": answer.id}
        with one.responses.stream(model=model, input=text) as events:
            said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            answer = events.get_final_response()
    assert answer.output_text == said
    return {"text": said, "state": answer.status, "id": answer.id}


def keep(model: str, text: str, length: int, **client: Any) -> Facts:
    """A response that is made in the background."""
    with _client(**client) as one:
        answer = one.responses.create(model=model, input=text, background=True, max_output_tokens=length)
        return {"id": answer.id, "state": answer.status}


def fetch(answer: str, **client: Any) -> Facts:
    """A response made before."""
    with _client(**client) as one:
        found = one.responses.retrieve(answer)
        return {"id": found.id, "state": found.status, "text": found.output_text}


def drop(answer: str, **client: Any) -> Facts:
    """A response in the background is cancelled."""
    with _client(**client) as one:
        found = one.responses.cancel(answer)
        return {"id": found.id, "state": found.status}


def use_tool(
    model: str, text: str, stream: bool = False, *, choice: str = "required", **client: Any
) -> Facts:
    """A tool call in a chat, then its result is sent back."""
    options: Any = {"tools": [TOOL], "tool_choice": choice}
    with _client(**client) as one:
        if stream:
            with one.chat.completions.stream(model=model, messages=_messages(text), **options) as events:
                message: Any = events.get_final_completion().choices[0].message
        else:
            message = (
                one.chat.completions.create(model=model, messages=_messages(text), **options)
                .choices[0]
                .message
            )
        (call,) = message.tool_calls
        turns = [
            *_messages(text),
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.function.name, "arguments": call.function.arguments},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": call.id, "content": "high water"},
        ]
        after = one.chat.completions.create(model=model, messages=turns, tools=[TOOL])
    return {
        "tool": call.function.name,
        "arguments": json.loads(call.function.arguments),
        "then": after.choices[0].message.content,
    }


def use_tool_in_response(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """A tool call in Responses."""
    tools: Any = [{"type": "function", **TOOL["function"]}]
    options: Any = {"tools": tools, "tool_choice": "required"}
    with _client(**client) as one:
        if stream:
            with one.responses.stream(model=model, input=text, **options) as events:
                item: Any = events.get_final_response().output[0]
        else:
            item = one.responses.create(model=model, input=text, **options).output[0]
    return {"tool": item.name, "arguments": json.loads(item.arguments)}


def shape(model: str, text: str, **client: Any) -> Facts:
    """A structured answer of a chat."""
    with _client(**client) as one:
        answer = one.chat.completions.parse(model=model, messages=_messages(text), response_format=Place)
    parsed = answer.choices[0].message.parsed
    assert parsed is not None
    return {"value": parsed.model_dump()}


def shape_response(model: str, text: str, **client: Any) -> Facts:
    """A structured answer of Responses."""
    with _client(**client) as one:
        parsed = one.responses.parse(model=model, input=text, text_format=Place).output_parsed
    assert parsed is not None
    return {"value": parsed.model_dump()}


def transcribe(model: str, sound: str, stream: bool = False, **client: Any) -> Facts:
    """Audio to text."""
    file = ("a.wav", base64.b64decode(sound))
    with _client(**client) as one:
        if not stream:
            return {"text": one.audio.transcriptions.create(model=model, file=file).text}
        events: Any = one.audio.transcriptions.create(model=model, file=file, stream=True)
        # vLLM streams chunks like a chat's, not OpenAI's typed events.
        return {"text": "".join(event.choices[0]["delta"]["content"] for event in events)}


def translate(model: str, sound: str, **client: Any) -> Facts:
    """Audio to English."""
    file = ("a.wav", base64.b64decode(sound))
    with _client(**client) as one:
        return {"text": one.audio.translations.create(model=model, file=file).text}


def speak(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """Text to speech."""
    options: Any = {"model": model, "voice": "alloy", "input": text, "response_format": "wav"}
    with _client(**client) as one:
        if not stream:
            return {"sound": digest(one.audio.speech.create(**options).read())}
        with one.audio.speech.with_streaming_response.create(**options) as answer:
            return {"sound": digest(b"".join(answer.iter_bytes()))}


def draw(model: str, text: str, **client: Any) -> Facts:
    """An image."""
    with _client(**client) as one:
        made = one.images.generate(model=model, prompt=text, size="256x256", response_format="b64_json")
    return {"picture": (made.data or [])[0].b64_json}


def redraw(model: str, text: str, image: str, **client: Any) -> Facts:
    """An image made of another."""
    file = ("a.png", base64.b64decode(image))
    with _client(**client) as one:
        made = one.images.edit(model=model, prompt=text, image=file, size="256x256")
    return {"picture": (made.data or [])[0].b64_json}


def models(**client: Any) -> Facts:
    """The list of models."""
    with _client(**client) as one:
        return {"ids": [model.id for model in one.models.list()]}


def model(name: str, **client: Any) -> Facts:
    """One model."""
    with _client(**client) as one:
        found = one.models.retrieve(name)
        return {"id": found.id, "object": found.object}


def upload(size: int, **client: Any) -> Facts:
    """A file, for a route that the gateway doesn't have."""
    with _client(**client) as one:
        return {"id": one.files.create(file=("a.txt", b"x" * size), purpose="user_data").id}


def read(dialect: str, model: str, text: str, **client: Any) -> Facts:
    """A stream is read to its end, whatever that is."""
    seen: list[str] = []
    try:
        with _client(**client) as one:
            events: Any
            if dialect == "chat":
                events = one.chat.completions.create(model=model, messages=_messages(text), stream=True)
            elif dialect == "complete":
                events = one.completions.create(model=model, prompt=text, stream=True)
            else:
                events = one.responses.create(model=model, input=text, stream=True)
            seen.extend(
                getattr(event, "type", event.object if dialect != "respond" else "") for event in events
            )
    except openai.APIError as error:
        return {"seen": seen, "raised": type(error).__name__, "message": str(error)}
    return {"seen": seen}


def leave(model: str, text: str, **client: Any) -> Facts:
    """A stream is left after its first piece; the client itself lives on."""
    one = _client(**client)
    stream = one.chat.completions.create(model=model, messages=_messages(text), stream=True, max_tokens=500)
    next(iter(stream))
    stream.close()
    _left.append(one)
    return {}


_left: list[OpenAI] = []

if __name__ == "__main__":
    serve(
        {
            one.__name__: one
            for one in (
                *(chat, complete, embed, respond, keep, fetch, drop, use_tool, use_tool_in_response, shape),
                *(
                    shape_response,
                    transcribe,
                    translate,
                    speak,
                    draw,
                    redraw,
                    models,
                    model,
                    upload,
                    read,
                    leave,
                ),
            )
        }
    )
