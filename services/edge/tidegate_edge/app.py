"""The application: an allow-list of inference routes that are relayed, and the edge's own pages."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson
import structlog

from tidegate_edge.answer import Answer
from tidegate_edge.catalog import Model
from tidegate_edge.cors import Cors
from tidegate_edge.downstream.exchange import Exchange
from tidegate_edge.envelope import Failure
from tidegate_edge.guard import Guard
from tidegate_edge.head import Head, Headers, new_request_id, raw_field, read_head
from tidegate_edge.keyring import NOBODY, Caller
from tidegate_edge.operations import Operations, Order, refuse_strangers
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
_JSON = b"application/json"
Page = Callable[[Caller], Awaitable[tuple[int, bytes, bytes]]]
"""Makes a page for a caller: status, content type, body."""


class Need(Enum):
    """Who may have a route."""

    NOTHING = "everybody"
    INFERENCE = "whoever may ask models"
    OPERATOR = "operators"


@dataclass(frozen=True, slots=True)
class Route:
    """A path that leads somewhere."""

    methods: frozenset[str]
    need: Need
    page: Page | None = None
    """None = it is relayed."""
    order: bool = False
    """It changes something, so that a browser's request is looked at."""


_READ = frozenset(("GET", "HEAD"))
_POST = frozenset(("POST",))


class App:
    """One edge's application."""

    def __init__(self, edge: Edge, status: Status, guard: Guard) -> None:
        self._edge = edge
        self._status = status
        self._guard = guard
        self._cors = Cors(edge.settings.cors_origins)
        self._operations = Operations(status.admission, status.lifecycle)
        relayed = [("POST", path) for path in RELAYED]
        relayed += [tuple(route.split(" ", 1)) for route in edge.settings.extra_routes]  # type: ignore[misc]
        methods: dict[str, set[str]] = {}
        for method, path in relayed:
            methods.setdefault(path, set()).add(method)
        self._routes = {
            path.encode(): Route(frozenset(taken), Need.INFERENCE) for path, taken in methods.items()
        } | {
            b"/v1/models": Route(_READ, Need.INFERENCE, self._models),
            b"/health": Route(_READ, Need.NOTHING, self._health),
            b"/ready": Route(_READ, Need.NOTHING, self._ready),
            b"/gateway/status": Route(_READ, Need.OPERATOR, self._gateway_status),
            b"/metrics": Route(_READ, Need.OPERATOR, self._metrics),
            b"/openapi.json": Route(_READ, Need.NOTHING, self._openapi),
        }

    async def __call__(self, exchange: Exchange) -> None:
        """Serves one request. The path is compared as it was sent: an encoded or dotted one is never turned
        into one of the list.

        1. Where to. 2. OPTIONS tells what is allowed, to everybody. 3. Who asks. 4. To a model server.
        5. An order: not for a page that may not give any. 6. A page.
        """
        path, method, headers = exchange.path, exchange.method, exchange.headers
        own: Headers = []
        try:
            head = read_head(headers)
            own = self._own(headers, head.request_id)
            route = self._find(path)  # 1
            if method == "OPTIONS":  # 2
                asked = raw_field(headers, b"access-control-request-method")
                names = raw_field(headers, b"access-control-request-headers")
                told = self._cors.preflight(head.origin, asked, names, route.methods | {"OPTIONS"})
                exchange.whole(204, [*told, *own], b"")
                return
            if method not in route.methods:
                allow = ", ".join(sorted(route.methods))
                raise Failure("method_not_allowed", f"This route takes {allow}.", allow=allow)
            caller = self._admit(route.need, head)  # 3
            if route.page is None:  # 4
                if self._edge.draining:
                    raise Failure("draining", "The service is stopping; try again.")
                await Relay(self._edge, exchange, head, own).run()
                return
            if route.order:  # 5
                refuse_strangers(self._cors, caller, head.origin, raw_field(headers, b"host"))
            status, kind, body = await route.page(caller)  # 6
            exchange.whole(status, [(b"content-type", kind), *own], body)
        except Failure as failure:
            self._edge.metrics.refused(failure.code)()
            Answer(exchange, path).fail(failure, own or self._own(headers, new_request_id()))

    def _own(self, headers: Headers, request_id: bytes) -> Headers:
        """The fields that every answer has."""
        return [(b"x-request-id", request_id), *self._cors.fields(raw_field(headers, b"origin"))]

    def _admit(self, need: Need, head: Head) -> Caller:
        if need is Need.NOTHING:
            return NOBODY
        ask = self._guard.operator if need is Need.OPERATOR else self._guard.inference
        caller = ask(head.authorization, head.api_key)
        head.admit(caller)
        return caller

    def _find(self, path: bytes) -> Route:
        """Raises Failure (404)."""
        route = self._routes.get(path)
        if route is not None:
            return route
        if path.startswith(_MODELS) and len(path) > len(_MODELS):
            # Ids may hold slashes, written plainly or encoded; the rest is only looked up, never a path.
            wanted = unquote_to_bytes(path[len(_MODELS) :]).decode(errors="replace")
            return Route(_READ, Need.INFERENCE, lambda caller: self._model(wanted, caller))
        order = self._operations.find(path)
        if order is None:
            raise Failure("not_found", "There is no such route.")
        return Route(_POST, Need.OPERATOR, lambda _: _carried_out(order), order=True)

    async def _models(self, caller: Caller) -> tuple[int, bytes, bytes]:
        if not self._edge.catalog.known:
            raise Failure("server_is_overloaded", "The catalogue of models is not known yet.", retry_after=2)
        models = self._edge.catalog.models()
        entries = [_entry(model) for model in models if caller.may_use(model.name, model.aliases)]
        return 200, _JSON, orjson.dumps({"object": "list", "data": entries})

    async def _model(self, wanted: str, caller: Caller) -> tuple[int, bytes, bytes]:
        model = self._edge.catalog.find(wanted)
        if model is None or not caller.may_use(model.name, model.aliases):
            raise Failure("model_not_found", f"The model `{wanted[:128]}` does not exist.", param="model")
        return 200, _JSON, orjson.dumps(_entry(model))

    async def _health(self, _: Caller) -> tuple[int, bytes, bytes]:
        return 200, _JSON, b'{"status":"ok"}'

    async def _ready(self, _: Caller) -> tuple[int, bytes, bytes]:
        why = self._edge.ready()
        body = orjson.dumps({"status": "not ready", "reason": why} if why else {"status": "ready"})
        return 503 if why else 200, _JSON, body

    async def _gateway_status(self, _: Caller) -> tuple[int, bytes, bytes]:
        return 200, _JSON, orjson.dumps(await self._status.snapshot(self._edge, self._guard))

    async def _metrics(self, _: Caller) -> tuple[int, bytes, bytes]:
        return 200, b"text/plain; version=0.0.4; charset=utf-8", self._edge.metrics.text()

    async def _openapi(self, _: Caller) -> tuple[int, bytes, bytes]:
        return 200, _JSON, orjson.dumps(self._described())

    def _described(self) -> dict[str, Any]:
        error = {"$ref": "#/components/schemas/Error"}
        refused = {"description": "an error", "content": {"application/json": {"schema": error}}}
        answers = {"200": {"description": "the model server's answer"}, "default": refused}
        body = {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Request"}}},
        }
        page = {"responses": {"200": {"description": "as named"}, "default": refused}}
        relayed = {"requestBody": body, "responses": answers}
        paths = {
            path.decode(): {
                method.lower(): relayed if route.page is None else page
                for method in sorted(route.methods - {"HEAD"})
            }
            for path, route in self._routes.items()
        }
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


async def _carried_out(order: Order) -> tuple[int, bytes, bytes]:
    return 200, _JSON, orjson.dumps(await order())
