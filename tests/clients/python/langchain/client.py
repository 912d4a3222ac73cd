"""langchain-openai: chat models on both of OpenAI's dialects, completions, embeddings."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from runner import Facts, serve


class Place(BaseModel):
    """What a structured answer is."""

    name: str
    depth: int


@tool
def look_up(place: str, depth: int) -> str:
    """Says how the tide is at a place."""
    return f"high water at {place}, {depth}"


def _at(url: str, key: str = "none", retries: int = 0, timeout: float = 30) -> dict[str, Any]:
    return {"base_url": f"{url}/v1", "api_key": key, "max_retries": retries, "timeout": timeout}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content)


def _ask(one: Any, text: str, stream: bool) -> Any:
    if not stream:
        return one.invoke(text)
    whole: Any = None
    for piece in one.stream(text):
        whole = piece if whole is None else whole + piece
    return whole


def chat(model: str, text: str, stream: bool = False, *, length: int | None = None, **client: Any) -> Facts:
    """Chat completions."""
    one = ChatOpenAI(model=model, max_completion_tokens=length, stream_usage=True, **_at(**client))
    answer = _ask(one, text, stream)
    return {
        "text": _text(answer.content),
        "model": answer.response_metadata["model_name"],
        "finish": answer.response_metadata["finish_reason"],
        "tokens": answer.usage_metadata["output_tokens"],
    }


def complete(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """Completions."""
    return {"text": _ask(OpenAI(model=model, **_at(**client)), text, stream)}


def embed(model: str, texts: list[str], **client: Any) -> Facts:
    """Embeddings, sent as texts: counting tokens here would need OpenAI's vocabulary."""
    one = OpenAIEmbeddings(model=model, check_embedding_ctx_length=False, **_at(**client))
    return {"vectors": one.embed_documents(texts)}


def respond(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """Responses."""
    one = ChatOpenAI(model=model, use_responses_api=True, **_at(**client))
    answer = _ask(one, text, stream)
    metadata = answer.response_metadata
    return {"text": _text(answer.content), "state": metadata["status"], "id": metadata["id"]}


def _tool(one: Any, text: str, stream: bool) -> Facts:
    first = _ask(one.bind_tools([look_up], tool_choice="required"), text, stream)
    (call,) = first.tool_calls
    result = ToolMessage(look_up.invoke(call["args"]), tool_call_id=call["id"])
    after = one.bind_tools([look_up]).invoke([HumanMessage(text), first, result])
    return {"tool": call["name"], "arguments": call["args"], "then": _text(after.content)}


def use_tool(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """A tool call in a chat, then its result is sent back."""
    return _tool(ChatOpenAI(model=model, **_at(**client)), text, stream)


def use_tool_in_response(model: str, text: str, stream: bool = False, **client: Any) -> Facts:
    """A tool call in Responses, then its result is sent back."""
    return _tool(ChatOpenAI(model=model, use_responses_api=True, **_at(**client)), text, stream)


def shape(model: str, text: str, method: str = "json_schema", **client: Any) -> Facts:
    """A structured answer, by a schema or by a tool."""
    one: Any = ChatOpenAI(model=model, **_at(**client))
    return {"value": one.with_structured_output(Place, method=method).invoke(text).model_dump()}


def read(dialect: str, model: str, text: str, **client: Any) -> Facts:
    """A stream is read to its end, whatever that is."""
    one: Any
    if dialect == "complete":
        one = OpenAI(model=model, **_at(**client))
    else:
        one = ChatOpenAI(model=model, use_responses_api=dialect == "respond", **_at(**client))
    seen: list[str] = []
    try:
        seen.extend(type(piece).__name__ for piece in one.stream(text))
    except Exception as error:
        return {"seen": seen, "raised": type(error).__name__, "message": str(error)}
    return {"seen": seen}


def leave(model: str, text: str, **client: Any) -> Facts:
    """A stream is left after its first piece; the client itself lives on."""
    one = ChatOpenAI(model=model, max_completion_tokens=500, **_at(**client))
    stream: Any = one.stream(text)
    next(stream)
    stream.close()
    _left.append(one)
    return {}


_left: list[ChatOpenAI] = []

if __name__ == "__main__":
    serve(
        {
            one.__name__: one
            for one in (
                *(chat, complete, embed, respond, use_tool, use_tool_in_response, shape, read, leave),
            )
        }
    )
