"""LiteLLM as a library, with its providers for OpenAI's, Anthropic's and vLLM's dialects."""

from __future__ import annotations

import base64
import json
from typing import Any

import litellm
from runner import Facts, digest, serve

litellm.suppress_debug_info = True
litellm.drop_params = False

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "depth": {"type": "integer"}},
            "required": ["place", "depth"],
        },
    },
}
PLACE: Any = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "depth": {"type": "integer"}},
    "required": ["name", "depth"],
    "additionalProperties": False,
}


def _at(url: str, key: str = "none", retries: int = 0, timeout: float = 30) -> dict[str, Any]:
    return {"api_base": f"{url}/v1", "api_key": key, "max_retries": retries, "timeout": timeout}


def _messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


def chat(model: str, text: str, stream: bool = False, *, length: int | None = None, **client: Any) -> Facts:
    """Chat completions."""
    asked: Any = {"model": f"openai/{model}", "messages": _messages(text), **_at(**client)}
    if length is not None:
        asked["max_tokens"] = length
    if not stream:
        answer: Any = litellm.completion(**asked)
        choice = answer.choices[0]
        said, finish, used = choice.message.content, choice.finish_reason, answer.usage
        named = answer.model
    else:
        chunks: Any = list(litellm.completion(stream=True, stream_options={"include_usage": True}, **asked))
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        said = "".join(choice.delta.content or "" for choice in choices)
        finish = next(choice.finish_reason for choice in choices if choice.finish_reason)
        used = next(chunk.usage for chunk in reversed(chunks) if getattr(chunk, "usage", None))
        named = chunks[0].model
    return {"text": said, "model": named, "finish": finish, "tokens": used.completion_tokens}


def complete(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """Completions."""
    asked: Any = {"model": f"text-completion-openai/{model}", "prompt": text, **_at(**client)}
    if not stream:
        answer: Any = litellm.text_completion(**asked)
        return {"text": answer.choices[0].text}
    chunks: Any = litellm.text_completion(stream=True, **asked)
    return {"text": "".join(chunk.choices[0].text or "" for chunk in chunks)}


def embed(model: str, texts: list[str], **client: Any) -> Facts:
    """Embeddings."""
    answer: Any = litellm.embedding(
        model=f"openai/{model}", input=texts, encoding_format="float", **_at(**client)
    )
    return {"vectors": [item["embedding"] for item in answer.data]}


def respond(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """Responses."""
    asked: Any = {"model": f"openai/{model}", "input": text, **_at(**client)}
    if not stream:
        answer: Any = litellm.responses(**asked)
    else:
        events: Any = list(litellm.responses(stream=True, **asked))
        answer = events[-1].response
    return {"text": answer.output_text, "state": answer.status, "id": answer.id}


def keep(model: str, text: str, length: int, **client: Any) -> Facts:
    """A response that is made in the background."""
    answer: Any = litellm.responses(
        model=f"openai/{model}", input=text, background=True, max_output_tokens=length, **_at(**client)
    )
    return {"id": answer.id, "state": answer.status}


def fetch(answer: str, **client: Any) -> Facts:
    """A response made before."""
    found: Any = litellm.get_responses(answer, custom_llm_provider="openai", **_at(**client))
    return {"id": found.id, "state": found.status, "text": found.output_text}


def drop(answer: str, **client: Any) -> Facts:
    """A response in the background is cancelled."""
    found: Any = litellm.cancel_responses(answer, custom_llm_provider="openai", **_at(**client))
    return {"id": found.id, "state": found.status}


def message(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """Anthropic's messages, by its provider for them."""
    at = _at(**client)
    at["api_base"] = at["api_base"].removesuffix("/v1")
    asked: Any = {"model": f"anthropic/{model}", "messages": _messages(text), "max_tokens": 8, **at}
    if not stream:
        answer: Any = litellm.completion(**asked)
        return {"text": answer.choices[0].message.content}
    chunks: Any = litellm.completion(stream=True, **asked)
    return {"text": "".join(chunk.choices[0].delta.content or "" for chunk in chunks)}


def use_tool(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """A tool call in a chat, then its result is sent back."""
    asked: Any = {"model": f"openai/{model}", "tools": [TOOL], **_at(**client)}
    first = asked | {"messages": _messages(text), "tool_choice": "required"}
    if stream:
        chunks = list(litellm.completion(stream=True, **first))  # type: ignore[arg-type]
        said: Any = litellm.stream_chunk_builder(chunks)
    else:
        said = litellm.completion(**first)
    (call,) = said.choices[0].message.tool_calls
    turns = [
        *_messages(text),
        said.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "high water"},
    ]
    after: Any = litellm.completion(messages=turns, **asked)
    return {
        "tool": call.function.name,
        "arguments": json.loads(call.function.arguments),
        "then": after.choices[0].message.content,
    }


def shape(model: str, text: str, **client: Any) -> Facts:
    """A structured answer of a chat."""
    form = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": PLACE}}
    answer: Any = litellm.completion(
        model=f"openai/{model}", messages=_messages(text), response_format=form, **_at(**client)
    )
    return {"value": json.loads(answer.choices[0].message.content)}


def transcribe(model: str, sound: str, **client: Any) -> Facts:
    """Audio to text."""
    answer: Any = litellm.transcription(
        model=f"openai/{model}", file=("a.wav", base64.b64decode(sound)), **_at(**client)
    )
    return {"text": answer.text}


def speak(model: str, text: str, **client: Any) -> Facts:
    """Text to speech."""
    answer: Any = litellm.speech(
        model=f"openai/{model}", voice="alloy", input=text, response_format="wav", **_at(**client)
    )
    return {"sound": digest(answer.content)}


def draw(model: str, text: str, **client: Any) -> Facts:
    """An image."""
    made: Any = litellm.image_generation(
        model=f"openai/{model}", prompt=text, size="256x256", **_at(**client)
    )
    return {"picture": made.data[0].b64_json}


def redraw(model: str, text: str, image: str, **client: Any) -> Facts:
    """An image made of another."""
    made: Any = litellm.image_edit(
        model=f"openai/{model}",
        prompt=text,
        image=[base64.b64decode(image)],
        size="256x256",
        **_at(**client),
    )
    return {"picture": made.data[0].b64_json}


def rank(model: str, text: str, texts: list[str], **client: Any) -> Facts:
    """Documents in the order of a query, by its provider for vLLM."""
    at = _at(**client)
    answer: Any = litellm.rerank(
        model=f"hosted_vllm/{model}",
        query=text,
        documents=list(texts),
        **at | {"api_base": at["api_base"].removesuffix("/v1")},
    )
    return {"order": [item["index"] for item in answer.results]}


def read(dialect: str, model: str, text: str, **client: Any) -> Facts:
    """A stream is read to its end, whatever that is."""
    seen: list[str] = []
    at = _at(**client)
    try:
        events: Any
        if dialect == "chat":
            events = litellm.completion(model=f"openai/{model}", messages=_messages(text), stream=True, **at)
        elif dialect == "complete":
            events = litellm.text_completion(
                model=f"text-completion-openai/{model}", prompt=text, stream=True, **at
            )
        elif dialect == "message":
            at["api_base"] = at["api_base"].removesuffix("/v1")
            events = litellm.completion(
                model=f"anthropic/{model}", messages=_messages(text), stream=True, max_tokens=12, **at
            )
        else:
            events = litellm.responses(model=f"openai/{model}", input=text, stream=True, **at)
        seen.extend(str(getattr(event, "type", "")) for event in events)
    except Exception as error:
        return {"seen": seen, "raised": type(error).__name__, "message": str(error)}
    return {"seen": seen}


def leave(model: str, text: str, **client: Any) -> Facts:
    """A stream is left after its first piece; the client itself lives on."""
    stream: Any = litellm.completion(
        model=f"openai/{model}", messages=_messages(text), stream=True, max_tokens=500, **_at(**client)
    )
    next(iter(stream))
    stream.completion_stream.close()
    return {}


if __name__ == "__main__":
    serve(
        {
            one.__name__: one
            for one in (
                *(chat, complete, embed, respond, keep, fetch, drop, message, use_tool, shape, transcribe),
                *(speak, draw, redraw, rank, read, leave),
            )
        }
    )
