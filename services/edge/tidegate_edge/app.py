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

from tidegate_edge import openapi
from tidegate_edge.answer import Answer
from tidegate_edge.catalog import Model
from tidegate_edge.cors import Cors
from tidegate_edge.downstream.exchange import Exchange
from tidegate_edge.envelope import Failure, internal_error
from tidegate_edge.guard import Guard
from tidegate_edge.head import Head, Headers, raw_field, read_head, request_id
from tidegate_edge.keyring import NOBODY, Caller
from tidegate_edge.operations import Operations, Order, refuse_strangers
from tidegate_edge.relay import Relay
from tidegate_edge.routes import Routes
from tidegate_edge.shared import Edge
from tidegate_edge.status import Status

log = structlog.get_logger("tidegate.edge")

_MODELS = b"/v1/models/"
_JSON = b"application/json"
_READ = frozenset(("GET", "HEAD"))
_POST = frozenset(("POST",))


class Need(Enum):
    """Who may have a page."""

    NOTHING = "everybody"
    INFERENCE = "whoever may ask models"
    OPERATOR = "operators"


@dataclass(frozen=True, slots=True)
class Page:
    """What the edge answers by itself."""

    need: Need
    make: Callable[[Caller], Awaitable[tuple[int, bytes, bytes]]]
    """For a caller: status, content type, body. Raises Failure."""
    methods: frozenset[str] = _READ
    order: bool = False
    """It changes something, so that browsers' requests are looked at."""


class App:
    """One edge's application."""

    def __init__(self, edge: Edge, status: Status, guard: Guard) -> None:
        self._edge = edge
        self._status = status
        self._guard = guard
        self._cors = Cors(edge.settings.cors_origins)
        self._operations = Operations(status.admission, status.lifecycle)
        self._routes = Routes(edge.settings.extra_routes)
        self._pages = {
            b"/v1/models": Page(Need.INFERENCE, self._models),
            b"/health": Page(Need.NOTHING, self._health),
            b"/ready": Page(Need.NOTHING, self._ready),
            b"/gateway/status": Page(Need.OPERATOR, self._gateway_status),
            b"/metrics": Page(Need.OPERATOR, self._metrics),
            b"/openapi.json": Page(Need.NOTHING, self._openapi),
        }

    async def __call__(self, exchange: Exchange) -> None:
        """Serves one request. The path is compared as it was sent: an encoded or dotted one is never turned
        into one of the list.

        1. Where to. 2. OPTIONS tells what may be done, to everybody. 3. To a model server, for whoever may.
        4. To a page of the edge's own.
        """
        path, method, headers = exchange.path, exchange.method, exchange.headers
        own: Headers = []
        try:
            head = read_head(headers)
            own = self._own(headers, head.request_id)
            route, response = self._routes.find(path) or (None, b"")  # 1
            page = None if route else self._page(path)
            place = route or page
            if place is None:
                raise Failure("not_found", "There is no such route.")
            methods = place.methods
            if method == "OPTIONS":  # 2
                exchange.whole(204, [*self._preflight(headers, methods), *own], b"")
                return
            if method not in methods:
                allow = ", ".join(sorted(methods))
                raise Failure("method_not_allowed", f"This route takes {allow}.", allow=allow)
            if route is not None:  # 3
                head.admit(self._guard.inference(head.authorization, head.api_key))
                if self._edge.draining:
                    raise Failure("draining", "The service is stopping; try again.")
                await Relay(self._edge, exchange, head, own, route, response).run()
                return
            assert page is not None, "it is one of the two"
            status, kind, body = await page.make(self._visitor(page, head, headers))  # 4
            exchange.whole(status, [(b"content-type", kind), *own], body)
        except Failure as failure:
            self._edge.metrics.refused(failure.code)()
            Answer(exchange, path).fail(failure, own or self._own(headers, request_id(headers)))
        except Exception:  # of a page; a relay ends its own
            log.exception("a page failed", path=path.decode("latin-1"))
            if not exchange.started:
                Answer(exchange, path).fail(internal_error(), own)

    def _own(self, headers: Headers, request_id: bytes) -> Headers:
        """The fields that every answer has."""
        return [(b"x-request-id", request_id), *self._cors.fields(raw_field(headers, b"origin"))]

    def _preflight(self, headers: Headers, methods: frozenset[str]) -> Headers:
        origin = raw_field(headers, b"origin")
        method = raw_field(headers, b"access-control-request-method")
        names = raw_field(headers, b"access-control-request-headers")
        return self._cors.preflight(origin, method, names, methods | {"OPTIONS"})

    def _visitor(self, page: Page, head: Head, headers: Headers) -> Caller:
        """Who wants a page. Raises Failure (401, 403)."""
        if page.need is Need.NOTHING:
            return NOBODY
        ask = self._guard.operator if page.need is Need.OPERATOR else self._guard.inference
        caller = ask(head.authorization, head.api_key)
        if page.order:
            refuse_strangers(self._cors, caller, head.origin, raw_field(headers, b"host"))
        return caller

    def _page(self, path: bytes) -> Page | None:
        page = self._pages.get(path)
        if page is not None:
            return page
        if path.startswith(_MODELS) and len(path) > len(_MODELS):
            # Ids may hold slashes, written plainly or encoded; the rest is only looked up, never a path.
            wanted = unquote_to_bytes(path[len(_MODELS) :]).decode(errors="replace")
            return Page(Need.INFERENCE, lambda caller: self._model(wanted, caller))
        order = self._operations.find(path)
        if order is None:
            return None
        return Page(Need.OPERATOR, lambda _: _carried_out(order), _POST, order=True)

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
        return 200, b"text/plain; version=0.0.4; charset=utf-8", await self._edge.peers.metrics()

    async def _openapi(self, _: Caller) -> tuple[int, bytes, bytes]:
        return 200, _JSON, openapi.document(self._routes, self._status.version)


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
