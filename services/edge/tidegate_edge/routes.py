"""The allow-list: which method and path are passed to model servers. Pure.

Paths are compared byte by byte as they were sent: an encoded, dotted or doubled one is never turned into one
of the list. Everything else is 404, so that what operates a model server (sleep, collective_rpc, LoRA, ...)
can't be reached through here, whatever the server was started with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, Flag, auto


class Takes(Flag):
    """How a route's body may be written."""

    NOTHING = 0
    JSON = auto()
    FORM = auto()


class By(Enum):
    """What names the model."""

    BODY = "body"
    RESPONSE = "response"
    """A header, or the id in the path, of a response that was given before."""


@dataclass(frozen=True, slots=True)
class Route:
    """A path of the list."""

    path: str
    """With the id of a response written `{id}`."""
    methods: frozenset[str]
    takes: Takes = Takes.JSON
    by: By = By.BODY

    @property
    def label(self) -> bytes:
        """Its name in logs and traces, in which ids are no part."""
        return self.path.encode()


RESPONSES = "/v1/responses"

_FORMS = (
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/images/edits",
    "/v1/images/variations",
)
_JSON = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    RESPONSES,
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/audio/speech",
    "/v1/images/generations",
    "/v2/embed",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/score",
    "/v1/score",
    "/classify",
    "/pooling",
    "/tokenize",
    "/detokenize",
)
_BY_ID = (("", ("GET", "DELETE")), ("/cancel", ("POST",)), ("/input_items", ("GET",)))
_ID = re.compile(rb"/v1/responses/([A-Za-z0-9_-]{1,256})(/[a-z_]{1,16})?")


class Routes:
    """The built-in routes and those of `edge.extra_routes`."""

    def __init__(self, extra: Iterable[str] = ()) -> None:
        """`extra`: each a method and a path, such as "POST /v1/something"; with a body that names the model,
        as JSON or as a form."""
        post = frozenset(("POST",))
        found = {path: Route(path, post) for path in _JSON}
        found |= {path: Route(path, post, Takes.JSON | Takes.FORM) for path in _FORMS}
        for method, path in (one.split(" ", 1) for one in extra):
            before = found[path].methods if path in found else frozenset()
            found[path] = Route(path, before | {method}, Takes.JSON | Takes.FORM)
        self._plain = {path.encode(): route for path, route in found.items()}
        self._by_id = {
            end.encode(): Route(f"{RESPONSES}/{{id}}{end}", frozenset(methods), Takes.NOTHING, By.RESPONSE)
            for end, methods in _BY_ID
        }

    def all(self) -> list[Route]:
        """Every route, by path."""
        return sorted([*self._plain.values(), *self._by_id.values()], key=lambda route: route.path)

    def find(self, path: bytes) -> tuple[Route, bytes] | None:
        """The route of a path as it was sent, and the id in it (empty = it has none)."""
        route = self._plain.get(path)
        if route is not None:
            return route, b""
        match = _ID.fullmatch(path)
        route = self._by_id.get(match[2] or b"") if match else None
        return (route, match[1]) if route and match else None
