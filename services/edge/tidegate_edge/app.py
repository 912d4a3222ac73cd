"""The application: an allow-list of inference routes that are relayed, and the edge's own pages."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson
import structlog

from tidegate_edge.answer import Answer
from tidegate_edge.catalog import Model
from tidegate_edge.downstream.exchange import Exchange
from tidegate_edge.envelope import Failure
from tidegate_edge.head import Headers, new_request_id, read_head
from tidegate_edge.relay import Relay
from tidegate_edge.shared import Edge
from tidegate_edge.status import Status

log = structlog.get_logger("tidegate.edge")

RELAYED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/score",
    "/v1/score",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/classify",
)
"""POST routes passed to model servers. Everything that isn't listed is 404: a model server's operating routes
(sleep, collective_rpc, LoRA, ...) are never reachable through here, whatever it was started with."""

_MODELS = b"/v1/models/"
Page = Callable[[], Awaitable[tuple[int, bytes, bytes]]]
_JSON = b"application/json"


class App:
    """One edge's application."""

    def __init__(self, edge: Edge, status: Status) -> None:
        self._edge = edge
        self._status = status
        relayed = [("POST", path) for path in RELAYED]
        relayed += [tuple(route.split(" ", 1)) for route in edge.settings.extra_routes]  # type: ignore[misc]
        self._relayed: dict[bytes, frozenset[str]] = {}
        for method, path in relayed:
            key = path.encode()
            self._relayed[key] = self._relayed.get(key, frozenset()) | {method}
        self._pages: dict[bytes, Page] = {
            b"/v1/models": self._models,
            b"/health": self._health,
            b"/ready": self._ready,
            b"/gateway/status": self._gateway_status,
            b"/metrics": self._metrics,
            b"/openapi.json": self._openapi,
        }

    async def __call__(self, exchange: Exchange) -> None:
        """Serves one request. The path is compared as it was sent: an encoded or dotted one is never turned
        into one of the list."""
        path, method = exchange.path, exchange.method
        own: Headers = []
        try:
            methods = self._relayed.get(path)
            if methods is not None and method in methods:
                if self._edge.draining:
                    raise Failure("draining", "The service is stopping; try again.")
                head = read_head(exchange.headers, believed=self._edge.settings.auth == "none")
                await Relay(self._edge, exchange, head).run()
                return
            own = [(b"x-request-id", read_head(exchange.headers).request_id)]
            page = self._page(path)
            if page is None and methods is None:
                raise Failure("not_found", "There is no such route.")
            if page is None or method not in ("GET", "HEAD"):
                allow = ", ".join(sorted(methods or {"GET", "HEAD"}))
                raise Failure("method_not_allowed", f"This route takes {allow}.", allow=allow)
            status, kind, body = await page()
            exchange.whole(status, [(b"content-type", kind), *own], body)
        except Failure as failure:
            self._edge.metrics.refused(failure.code)()
            Answer(exchange, path).fail(failure, own or _request_id(exchange))

    def _page(self, path: bytes) -> Page | None:
        page = self._pages.get(path)
        if page is None and path.startswith(_MODELS) and len(path) > len(_MODELS):
            # Ids may hold slashes, written plainly or encoded; the rest is only looked up, never a path.
            wanted = unquote_to_bytes(path[len(_MODELS) :]).decode(errors="replace")
            return lambda: self._model(wanted)
        return page

    async def _models(self) -> tuple[int, bytes, bytes]:
        if not self._edge.catalog.known:
            raise Failure("server_is_overloaded", "The catalogue of models is not known yet.", retry_after=2)
        entries = [_entry(model) for model in self._edge.catalog.models()]
        return 200, _JSON, orjson.dumps({"object": "list", "data": entries})

    async def _model(self, wanted: str) -> tuple[int, bytes, bytes]:
        model = self._edge.catalog.find(wanted)
        if model is None:
            raise Failure("model_not_found", f"The model `{wanted[:128]}` does not exist.", param="model")
        return 200, _JSON, orjson.dumps(_entry(model))

    async def _health(self) -> tuple[int, bytes, bytes]:
        return 200, _JSON, b'{"status":"ok"}'

    async def _ready(self) -> tuple[int, bytes, bytes]:
        why = self._edge.ready()
        body = orjson.dumps({"status": "not ready", "reason": why} if why else {"status": "ready"})
        return 503 if why else 200, _JSON, body

    async def _gateway_status(self) -> tuple[int, bytes, bytes]:
        return 200, _JSON, orjson.dumps(await self._status.snapshot(self._edge))

    async def _metrics(self) -> tuple[int, bytes, bytes]:
        return 200, b"text/plain; version=0.0.4; charset=utf-8", self._edge.metrics.text()

    async def _openapi(self) -> tuple[int, bytes, bytes]:
        return 200, _JSON, orjson.dumps(self._described())

    def _described(self) -> dict[str, Any]:
        error = {"$ref": "#/components/schemas/Error"}
        refused = {"description": "an error", "content": {"application/json": {"schema": error}}}
        answers = {"200": {"description": "the model server's answer"}, "default": refused}
        body = {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Request"}}},
        }
        paths: dict[str, Any] = {
            path.decode(): {
                method.lower(): {"requestBody": body, "responses": answers} for method in sorted(methods)
            }
            for path, methods in self._relayed.items()
        }
        page = {"get": {"responses": {"200": {"description": "as named"}, "default": refused}}}
        paths |= {path.decode(): page for path in self._pages}
        inner = {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")}
        schemas = {
            "Request": {"type": "object", "required": ["model"], "properties": {"model": {"type": "string"}}},
            "Error": {"type": "object", "properties": {"error": {"type": "object", "properties": inner}}},
        }
        info = {"title": "tidegate", "version": self._status.version}
        return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _entry(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(time.time() - model.created_age),
        "owned_by": "tidegate",
        "aliases": list(model.aliases),
        "state": model.state,
        "engine": model.engine,
    }


def _request_id(exchange: Exchange) -> Headers:
    try:
        return [(b"x-request-id", read_head(exchange.headers).request_id)]
    except Failure:
        return [(b"x-request-id", new_request_id())]
