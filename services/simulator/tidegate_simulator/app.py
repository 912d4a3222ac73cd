"""The table of routes, and what every request goes through."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from tidegate_simulator import audio, completions, messages, omni, operations, pooling, responses
from tidegate_simulator.errors import Cut, Refusal, answer, json_response
from tidegate_simulator.sabotage import before_handling
from tidegate_simulator.state import SIMULATOR, Simulator
from tidegate_simulator.stream import Ended

Route = Callable[[Simulator, web.Request], Awaitable[web.StreamResponse]]

SERVING: dict[tuple[str, str], Route] = {
    ("POST", "/v1/chat/completions"): completions.chat,
    ("POST", "/v1/completions"): completions.completions,
    ("POST", "/v1/responses"): responses.create,
    ("POST", "/v1/messages"): messages.messages,
    ("POST", "/v1/messages/count_tokens"): messages.count,
    ("POST", "/v1/embeddings"): pooling.embeddings,
    ("POST", "/pooling"): pooling.pooling,
    ("POST", "/classify"): pooling.classify,
    ("POST", "/score"): pooling.score,
    ("POST", "/v1/score"): pooling.score,
    ("POST", "/rerank"): pooling.rerank,
    ("POST", "/v1/rerank"): pooling.rerank,
    ("POST", "/v2/rerank"): pooling.rerank,
    ("POST", "/v2/embed"): pooling.embed,
    ("POST", "/v1/audio/transcriptions"): audio.transcriptions,
    ("POST", "/v1/audio/translations"): audio.translations,
    ("POST", "/v1/audio/speech"): omni.speech,
    ("POST", "/v1/images/generations"): omni.generate,
    ("POST", "/v1/images/edits"): omni.edit,
}
"""Routes that run the model. Faults strike these unless they name a path."""

OPERATING: dict[tuple[str, str], Route] = {
    ("GET", "/health"): operations.health,
    ("GET", "/ping"): operations.health,
    ("POST", "/ping"): operations.health,
    ("GET", "/version"): operations.version,
    ("GET", "/load"): operations.load,
    ("GET", "/metrics"): operations.metrics,
    ("GET", "/v1/models"): operations.models,
    ("GET", "/v1/responses/{id}"): responses.get,
    ("POST", "/v1/responses/{id}/cancel"): responses.cancel,
    ("POST", "/tokenize"): pooling.tokenize,
    ("POST", "/detokenize"): pooling.detokenize,
}

SLEEPING: dict[tuple[str, str], Route] = {
    ("POST", "/sleep"): operations.sleep,
    ("POST", "/wake_up"): operations.wake_up,
    ("GET", "/is_sleeping"): operations.is_sleeping,
    ("POST", "/collective_rpc"): operations.collective_rpc,
}
"""Only with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1."""

OWN: dict[tuple[str, str], Route] = {
    ("GET", "/simulator/requests"): operations.requests,
    ("DELETE", "/simulator/requests"): operations.forget_requests,
    ("GET", "/simulator/faults"): operations.faults,
    ("POST", "/simulator/faults"): operations.add_fault,
    ("DELETE", "/simulator/faults"): operations.clear_faults,
}

_OWN_PREFIX = "/simulator/"
# vLLM's key guards these and leaves the rest open.
_GUARDED = ("/v1", "/v2", "/inference", "/cohere")
_LARGEST_BODY = 1 << 30
_INSTANCE = str(os.getpid())


class Unauthorized(Exception):
    """The key is missing or another."""


def build(simulator: Simulator) -> web.Application:
    """The application."""
    app = web.Application(middlewares=[_outermost], client_max_size=_LARGEST_BODY)
    app[SIMULATOR] = simulator
    table = SERVING | OPERATING | OWN | (SLEEPING if simulator.options.sleep_mode else {})
    for (method, path), route in table.items():
        app.router.add_route(method, path, _bound(simulator, route))
    app.on_response_prepare.append(_add_headers)
    return app


def _bound(simulator: Simulator, route: Route) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await route(simulator, request)

    return handler


@web.middleware
async def _outermost(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Records the request and turns what went wrong into an answer. A broken connection has none: what is
    returned then goes nowhere."""
    simulator = request.app[SIMULATOR]
    if request.path.startswith(_OWN_PREFIX):
        return await _answered(simulator, request, handler)
    try:
        with simulator.journal.record(request) as entry:
            entry.received(await request.read())
            response = await _answered(simulator, request, handler)
            entry.status = response.status
            return response
    except (Cut, ConnectionError):
        return web.Response()


async def _answered(simulator: Simulator, request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        await _checked(simulator, request)
        return await handler(request)
    except Unauthorized:
        # The one error that vLLM gives without its envelope.
        return json_response({"error": "Unauthorized"}, 401)
    except Refusal as refusal:
        return answer(refusal, anthropic=request.path.startswith("/v1/messages"))
    except Ended as ended:
        return ended.response
    except web.HTTPException as error:
        return answer(Refusal(error.status, error.reason))


async def _checked(simulator: Simulator, request: web.Request) -> None:
    """Raises Refusal for a request that no handler is to see; a fault may strike."""
    path = request.path
    if not simulator.loaded:
        raise Refusal(503, "Loading model")
    key = simulator.options.api_key
    if key is not None and path.startswith(_GUARDED):
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise Unauthorized
    if path.startswith(_OWN_PREFIX):
        return
    fault = simulator.faults.at_request(path, (request.method, path) in SERVING)
    if fault is not None:
        await before_handling(fault, request)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "uvicorn"
    response.headers["x-simulator-instance"] = _INSTANCE
    if request.app[SIMULATOR].options.echo_request_id and "X-Request-Id" in request.headers:
        response.headers["X-Request-Id"] = request.headers["X-Request-Id"]
