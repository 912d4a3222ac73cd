"""Routes that answer with numbers or tokens: embeddings, scores, ranks, classes, tokenizing."""

from __future__ import annotations

import base64
import struct
import time
from typing import Any

from aiohttp import web

from tidegate_simulator.engine import Work
from tidegate_simulator.errors import Refusal, json_response
from tidegate_simulator.state import Simulator, new_id, read_object, required, usage, whole
from tidegate_simulator.stream import collected
from tidegate_simulator.text import Plan, decode, encode, flatten, render, similarity, vector

_DIMENSIONS = 64
_LABELS = ("LABEL_0", "LABEL_1")


async def embeddings(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v1/embeddings; `encoding_format` float or base64, `dimensions` at will."""
    body = await read_object(request)
    head = _head(simulator, request, body, "embd-")
    texts = _texts(body.get("input", body.get("messages")))
    dimensions = whole(body, "dimensions", 1) or _DIMENSIONS
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise Refusal(400, "encoding_format must be float or base64.", param="encoding_format")
    prompt_tokens = await _run(simulator, request, texts)
    data = []
    for index, text in enumerate(texts):
        values: Any = vector(text, dimensions)
        if encoding == "base64":
            values = _packed(values)
        data.append({"index": index, "object": "embedding", "embedding": values})
    return json_response(head | {"data": data, "usage": usage(prompt_tokens, 0)})


async def embed(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /v2/embed, Cohere's; `embedding_types` float and base64."""
    body = await read_object(request)
    simulator.model(body)
    texts = _texts(body.get("texts", body.get("inputs")))
    types = body.get("embedding_types") or ["float"]
    if not isinstance(types, list) or not set(types) <= {"float", "base64"}:
        raise Refusal(400, "embedding_types may hold float and base64.", param="embedding_types")
    dimensions = whole(body, "output_dimension", 1) or _DIMENSIONS
    tokens = await _run(simulator, request, texts)
    vectors = [vector(text, dimensions) for text in texts]
    found = {"float": vectors, "base64": [_packed(values) for values in vectors]}
    return json_response(
        {
            "id": new_id(request, "embd-"),
            "embeddings": {kind: found[kind] for kind in types},
            "texts": texts,
            "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens}},
        }
    )


async def pooling(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /pooling."""
    body = await read_object(request)
    head = _head(simulator, request, body, "pool-")
    texts = _texts(body.get("input", body.get("messages")))
    prompt_tokens = await _run(simulator, request, texts)
    data = [
        {"index": index, "object": "pooling", "data": vector(text, _DIMENSIONS)}
        for index, text in enumerate(texts)
    ]
    return json_response(head | {"data": data, "usage": usage(prompt_tokens, 0)})


async def classify(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /classify."""
    body = await read_object(request)
    head = _head(simulator, request, body, "classify-")
    texts = _texts(body.get("input", body.get("messages")))
    prompt_tokens = await _run(simulator, request, texts)
    data = []
    for index, text in enumerate(texts):
        first = (vector(text, 1 + len(_LABELS))[0] + 1) / 2
        label = _LABELS[0 if first >= 0.5 else 1]
        data.append(
            {"index": index, "label": label, "probs": [first, 1 - first], "num_classes": len(_LABELS)}
        )
    return json_response(head | {"data": data, "usage": usage(prompt_tokens, 0)})


async def score(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /score and /v1/score: one text against one or many, or pairs."""
    body = await read_object(request)
    head = _head(simulator, request, body, "score-")
    left = _texts(body.get("text_1", body.get("queries")))
    right = _texts(body.get("text_2", body.get("documents")))
    if len(left) not in (1, len(right)):
        raise Refusal(400, "Input lengths must be either 1:1, 1:N or N:N")
    prompt_tokens = await _run(simulator, request, [*left, *right])
    pairs = zip(left * (len(right) // len(left)), right, strict=True)
    data = [
        {"index": index, "object": "score", "score": similarity(query, document)}
        for index, (query, document) in enumerate(pairs)
    ]
    return json_response(head | {"data": data, "usage": usage(prompt_tokens, 0)})


async def rerank(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /rerank, /v1/rerank, /v2/rerank: best first."""
    body = await read_object(request)
    name = simulator.model(body)
    query = flatten(required(body, "query", str))
    documents = _texts(required(body, "documents", list))
    top = whole(body, "top_n", 0) or len(documents)
    tokens = await _run(simulator, request, [query, *documents])
    results = [
        {"index": index, "document": {"text": document}, "relevance_score": similarity(query, document)}
        for index, document in enumerate(documents)
    ]
    results.sort(key=lambda result: -float(str(result["relevance_score"])))
    return json_response(
        {
            "id": new_id(request, "rerank-"),
            "model": name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": results[:top],
        }
    )


async def tokenize(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /tokenize, of a prompt or of a chat's messages."""
    body = await read_object(request)
    simulator.model(body)
    given = body.get("prompt")
    ids = encode(given if isinstance(given, str) else render(required(body, "messages", list)))
    strings = [decode([number]) for number in ids] if body.get("return_token_strs") else None
    return json_response(
        {
            "count": len(ids),
            "max_model_len": simulator.options.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }
    )


async def detokenize(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    """POST /detokenize."""
    body = await read_object(request)
    simulator.model(body)
    ids = required(body, "tokens", list)
    if not all(isinstance(number, int) and number >= 0 for number in ids):
        raise Refusal(400, "tokens must be a list of token ids.", param="tokens")
    return json_response({"prompt": decode(ids)})


def _head(simulator: Simulator, request: web.Request, body: dict[str, Any], prefix: str) -> dict[str, Any]:
    name = simulator.model(body)
    return {"id": new_id(request, prefix), "object": "list", "created": int(time.time()), "model": name}


async def _run(simulator: Simulator, request: web.Request, texts: list[str]) -> int:
    """Takes a slot for as long as a first token takes; the prompt's tokens."""
    tokens = sum(simulator.fitting(text) for text in texts)
    work = Work(tokens)
    async with simulator.engine.slot(work):
        # One token, as counted for faults and metrics: a pooling model runs its prompt once.
        await collected(simulator, request, work, Plan(tokens, [""], "stop"))
    return tokens


def _texts(given: Any) -> list[str]:
    """A text, token ids, or a list of either, as texts. Raises Refusal."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise Refusal(
            400, "The input must be a text, token ids, or a list of either, and not empty.", param="input"
        )
    if all(isinstance(item, int) for item in given):
        return [decode(given)]
    if all(isinstance(item, dict) and "role" in item for item in given):
        return [render(given)]
    return [decode(item) if _are_ids(item) else flatten([item]) for item in given]


def _packed(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _are_ids(item: Any) -> bool:
    return isinstance(item, list) and all(isinstance(number, int) for number in item)
