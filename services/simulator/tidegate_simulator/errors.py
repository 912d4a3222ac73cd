"""Refusals, and the bodies that vLLM gives them."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from aiohttp import web

_KINDS = {
    400: "BadRequestError",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
# A malformed body is not echoed back at full length.
_LONGEST_MESSAGE = 2000


class Refusal(Exception):
    """A request is answered with an error; raised anywhere below a handler."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, retry_after: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after = retry_after


class Cut(Exception):
    """The connection was broken on purpose; there is nobody left to answer."""


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """vLLM's envelope: OpenAI's, but `code` is the status and `type` reads like a class."""
    kind = _KINDS.get(status) or _phrase(status)
    return {"error": {"message": message[:_LONGEST_MESSAGE], "type": kind, "param": param, "code": status}}


def anthropic_body(status: int, message: str) -> dict[str, Any]:
    """The envelope of the Anthropic routes."""
    error = error_body(status, message)["error"]
    return {"type": "error", "error": {"type": error["type"], "message": error["message"]}}


def answer(refusal: Refusal, *, anthropic: bool = False) -> web.Response:
    """The whole answer to a refused request."""
    if anthropic:
        body = anthropic_body(refusal.status, refusal.message)
    else:
        body = error_body(refusal.status, refusal.message, refusal.param)
    response = json_response(body, refusal.status)
    if refusal.retry_after is not None:
        response.headers["Retry-After"] = refusal.retry_after
    return response


def json_response(body: Any, status: int = 200) -> web.Response:
    """A JSON answer, compact and in UTF-8, as vLLM's."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return web.Response(body=data, status=status, content_type="application/json")


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
