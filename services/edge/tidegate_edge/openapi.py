"""/openapi.json: what is served, as far as the edge judges it. Pure.

What stands in a body beside `model` is the model server's to judge, and so are its answers: they are
described as anything.
"""

from __future__ import annotations

from typing import Any

import orjson

from tidegate_edge.envelope import KINDS
from tidegate_edge.routes import By, Route, Routes, Takes
from tidegate_edge.scanner import MAX_NAME

Schema = dict[str, Any]

_ALWAYS = (400, 408, 417, 431, 500, 501, 503, 505)
"""Statuses of errors that any request may get."""
_GUARDED = (401, 403)
_RELAYED = (404, 413, 429, 502, 504)
_WORDS = {
    400: "The request is malformed, or something in it is missing or twice.",
    401: "The key is missing or unknown.",
    403: "The key doesn't allow this.",
    404: "There is no such model or response.",
    408: "The request came too slowly.",
    413: "The body is too large.",
    417: "`Expect` says something other than 100-continue.",
    429: "The queue is full, or a rate is used up.",
    431: "The head is too large.",
    500: "A fault of the gateway.",
    501: "A transfer coding or method that isn't offered.",
    502: "The model server couldn't be reached, or broke off.",
    503: "The model can't be had now, or the gateway is overloaded, not ready or stopping.",
    504: "A deadline has passed.",
    505: "Another version of HTTP.",
}
_MODEL: Schema = {
    "type": "string",
    "minLength": 1,
    "description": "A name or an alias of /v1/models.",
}
_BODY: Schema = {
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": _MODEL | {"maxLength": MAX_NAME},
        "stream": {"description": "true = the answer is to be a stream of server-sent events."},
    },
    "description": "The model server judges everything but `model`.",
}
_FORM: Schema = {
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": _MODEL | {"maxLength": 256},
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
    },
    "description": "`model` may stand before or behind files. The model server judges everything else.",
}
_SCHEMAS: dict[str, Schema] = {
    "Request": _BODY,
    "Form": _FORM,
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string", "maxLength": 500},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "string", "enum": sorted(KINDS)},
                },
            }
        },
    },
    "Model": {
        "type": "object",
        "required": ["id", "object", "created", "owned_by", "aliases", "state", "engine"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "aliases": {"type": "array", "items": {"type": "string"}},
            "state": {"type": "string"},
            "engine": {"type": "string"},
        },
    },
    "Models": {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
        },
    },
    "Health": {"type": "object", "required": ["status"], "properties": {"status": {"const": "ok"}}},
    "Ready": {
        "type": "object",
        "required": ["status"],
        "properties": {"status": {"enum": ["ready", "not ready"]}, "reason": {"type": "string"}},
    },
    "Anything": {"type": "object"},
}


def document(routes: Routes, version: str) -> bytes:
    """The description, as JSON. `version`: the gateway's."""
    paths = {route.path: _relayed(route) for route in routes.all()}
    paths |= {
        "/v1/models": _page("The models, with their states.", "Models"),
        "/v1/models/{model}": _page("One model, by its name or an alias.", "Model", (404,), _path("model")),
        "/health": _page("The process lives.", "Health"),
        "/ready": _ready(),
        "/gateway/status": _page("Models, queues, devices and services.", "Anything", _GUARDED),
        "/metrics": _page("For Prometheus.", "", _GUARDED),
        "/openapi.json": _page("This description.", "Anything"),
    }
    paths |= {path: _order(words, path) for path, words in _ORDERS.items()}
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": "tidegate", "version": version},
            "paths": paths,
            "security": [{"key": []}, {"field": []}, {}],
            "components": {
                "securitySchemes": _KEYS,
                "schemas": _SCHEMAS,
                "responses": {f"E{status}": _error(status) for status in _WORDS},
            },
        }
    )


def _relayed(route: Route) -> Schema:
    parameters = list(_HEADERS)
    if route.by is By.RESPONSE:
        known = _header("x-tidegate-model", _MODEL | {"pattern": "^[!-~]{1,256}$"})
        known["description"] = "Whose response it is; may be left out where this edge has given it itself."
        parameters += [_path("id", "^[A-Za-z0-9_-]{1,256}$"), known]
    found: Schema = {
        "summary": "Passed to a server of the model that " + _SUMMARY[route.by],
        "parameters": parameters,
        "responses": {
            "default": {
                "description": "The model server's answer; streams are text/event-stream.",
                "content": {"*/*": {}},
            },
            **_errors((*_ALWAYS, *_GUARDED, *_RELAYED), own=False),
        },
    }
    kinds = {"application/json": (Takes.JSON, "Request"), "multipart/form-data": (Takes.FORM, "Form")}
    content = {kind: {"schema": _ref(name)} for kind, (takes, name) in kinds.items() if takes in route.takes}
    if content:
        found["requestBody"] = {"required": True, "content": content}
    return {
        method.lower(): found | {"operationId": f"{method.lower()} {route.path}"}
        for method in sorted(route.methods)
    }


def _order(words: str, path: str) -> Schema:
    content: Schema = {"application/json": {"schema": _ref("Anything")}}
    name = path[path.index("{") + 1 : path.index("}")]
    return {
        "post": {
            "summary": words,
            "tags": ["orders"],
            "parameters": [_path(name)],
            "responses": {
                "200": {"description": "What came of it.", "content": content},
                **_errors((*_ALWAYS, *_GUARDED, 404)),
            },
        }
    }


def _page(summary: str, schema: str, errors: tuple[int, ...] = (), *parameters: Schema) -> Schema:
    content: Schema = {"application/json": {"schema": _ref(schema)}} if schema else {"text/plain": {}}
    responses = {"200": {"description": summary, "content": content}, **_errors((*_ALWAYS, *errors))}
    common = {"summary": summary, "parameters": list(parameters)}
    return {
        "get": common | {"responses": responses},
        "head": common | {"responses": {"default": {"description": "As for GET, without a body."}}},
    }


def _ready() -> Schema:
    found = _page("Whether requests can be served.", "Ready")
    content = {"application/json": {"schema": {"anyOf": [_ref("Ready"), _ref("Error")]}}}
    found["get"]["responses"]["503"] = {"description": "They can't, and why.", "content": content}
    return found


def _errors(statuses: tuple[int, ...], own: bool = True) -> Schema:
    """`own`: they are the gateway's alone; else the model server may give them as well."""
    if own:
        return {str(status): {"$ref": f"#/components/responses/E{status}"} for status in sorted(statuses)}
    either = {"application/json": {"schema": {"anyOf": [_ref("Error"), {}]}}, "*/*": {}}
    return {
        str(status): _error(status)
        | {"content": either, "description": f"{_WORDS[status]} Or the model server's."}
        for status in sorted(statuses)
    }


def _error(status: int) -> Schema:
    found: Schema = {
        "description": _WORDS[status],
        "content": {"application/json": {"schema": _ref("Error")}},
    }
    if status in (429, 503):
        schema = {"type": "integer", "minimum": 1, "maximum": 120}
        found["headers"] = {"Retry-After": {"description": "Seconds.", "schema": schema}}
    return found


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _header(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "header", "required": False, "schema": schema}


def _path(name: str, pattern: str = "") -> Schema:
    schema: Schema = {"type": "string", "minLength": 1} | ({"pattern": pattern} if pattern else {})
    return {"name": name, "in": "path", "required": True, "schema": schema}


_ORDERS = {
    "/gateway/models/{model}/load": "Loads a model.",
    "/gateway/models/{model}/unload": "Unloads a model.",
    "/gateway/models/{model}/pin": "Keeps a model from being unloaded for another one.",
    "/gateway/models/{model}/unpin": "Ends that.",
    "/gateway/leases/{lease}/revoke": "Ends a request that runs.",
}
_KEYS: Schema = {
    "key": {"type": "http", "scheme": "bearer", "description": "Not needed where the gateway is open."},
    "field": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same keys."},
}
_SUMMARY = {By.BODY: "the body names.", By.RESPONSE: "gave the response."}
_HEADERS = (
    _header("x-request-id", {"type": "string", "description": "Kept if it is [A-Za-z0-9._-]{1,128}."}),
    _header("x-tidegate-deadline-ms", {"type": "integer", "minimum": 1, "maximum": 86_400_000}),
    _header("x-tidegate-affinity", {"type": "string", "pattern": "^[!-~]{1,128}$"}),
    _header("x-tidegate-tenant", {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}),
    _header("x-tidegate-priority", {"type": "string", "enum": ["high", "normal", "low"]}),
)
