"""When something goes wrong, real clients learn of it in their own words, and what they held is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.clients.conftest import Scene, having
from tests.clients.programs import CLIENTS, has_status
from tests.support.gateway import wait_for

ASK = "which way does the tide run?"
STREAMS = {
    "openai": ("chat", "complete", "respond"),
    "openai_httpx": ("chat", "complete", "respond"),
    "openai_node": ("chat", "complete", "respond"),
    "anthropic": ("message",),
    "litellm": ("chat", "complete", "message", "respond"),
    "langchain": ("chat", "complete", "respond"),
    "ai_openai": ("chat", "complete", "respond"),
    "ai_compatible": ("chat", "complete"),
}
CHATTING = [name for name, program in CLIENTS.items() if "chat" in program.routes]
# What each client calls it when the time that its caller gave it is over.
TIMEOUTS = {
    **dict.fromkeys(("openai", "openai_httpx", "anthropic"), "APITimeoutError"),
    "langchain": "OpenAITimeoutError",
    "openai_node": "APIConnectionTimeoutError",
    "litellm": "Timeout",
    "curl": "Failed",
    **dict.fromkeys(("ai_openai", "ai_compatible"), "TimeoutError"),
}


@contextmanager
def occupied(scene: Scene, model: str, streams: int) -> Iterator[None]:
    """So many streams run or wait, until the block ends. Whoever waits has been told so by a comment."""
    scene.behind(model)  # is loaded
    body = {"model": model, "stream": True, "max_tokens": 400, "messages": [{"role": "user", "content": ASK}]}
    with ExitStack() as held:
        for _ in range(streams):
            stream = held.enter_context(scene.gateway.http.stream("POST", "/v1/chat/completions", json=body))
            assert stream.status_code == 200
        yield


@pytest.mark.parametrize("fault", ["error-after", "cut-after"])
@pytest.mark.parametrize(
    ("name", "dialect"), [(name, one) for name, dialects in STREAMS.items() for one in dialects]
)
def test_a_stream_that_breaks(scene: Scene, name: str, dialect: str, fault: str) -> None:
    """A server that fails in mid-stream, or vanishes, is an error to the caller, no end like any other."""
    client = scene.client(name)
    asked = {"dialect": dialect, "model": "chat", "text": ASK}
    whole = client.do("read", **asked)
    scene.behind().fault(fault, after=3, times=1)
    client.begin("read", **asked)
    broken = client.result()
    assert "raised" in broken or "error" in broken["seen"], broken
    assert len(broken["seen"]) < len(whole["seen"])
    assert not {"response.completed", "message_stop"} & set(broken["seen"])


@having("leave")
def test_a_client_that_leaves(scene: Scene, name: str) -> None:
    """A stream that is left in the middle ends at the server too, and its slot is free."""
    scene.behind("slow").clear()
    scene.client(name).do("leave", model="slow", text=ASK)
    wait_for(scene.gateway.is_idle, "the slot is free", 5)
    (request,) = scene.behind("slow").arrived("/v1/chat/completions", "/v1/messages")
    assert request["ended"] == "aborted"


@having("chat")
def test_a_client_that_runs_out_of_patience(scene: Scene, name: str) -> None:
    """A client whose time is over says so, and its request ends at the server too."""
    scene.behind("slow").clear()
    facts = scene.client(name).fail("chat", model="slow", text=ASK, length=400, timeout=0.7)
    assert facts["raised"] == TIMEOUTS[name]
    wait_for(scene.gateway.is_idle, "the slot is free", 5)
    (request,) = scene.behind("slow").arrived("/v1/chat/completions", "/v1/messages")
    assert request["ended"] == "aborted"


@having("chat")
def test_an_unknown_model(scene: Scene, name: str) -> None:
    """The client's own error for what isn't there, with the reason, and no second try."""
    before = scene.refused("model_not_found")
    facts = scene.client(name).fail("chat", model="nobody", text=ASK, retries=2)
    assert has_status(facts, 404), facts
    assert "`nobody`" in facts["message"] or name == "curl", facts
    assert scene.refused("model_not_found") == before + 1


@having("chat")
def test_a_body_that_is_too_large(scene: Scene, name: str) -> None:
    """A client that is still sending learns that its body is too large, not that its connection is gone."""
    before = scene.refused("body_too_large")
    text = "tide " * 600_000
    facts = scene.client(name).fail("chat", model="chat", text=text, retries=2)
    assert has_status(facts, 413), facts
    assert scene.refused("body_too_large") == before + 1


@having("upload")
def test_a_route_that_does_not_exist(scene: Scene, name: str) -> None:
    """An upload to a route that isn't there is the client's error for that, though nobody reads it."""
    assert scene.client(name).fail("upload", size=3_000_000)["raised"] == "NotFoundError"


@having("chat")
def test_the_servers_own_refusal(scene: Scene, name: str) -> None:
    """What the server behind refuses is the client's error, in the server's words."""
    facts = scene.client(name).fail("chat", model="chat", text=ASK, length=100_000)
    assert has_status(facts, 400), facts
    assert "maximum context length" in facts["message"], facts


@having("chat")
def test_a_retry_that_cannot_help(scene: Scene, name: str) -> None:
    """A model that can't be had now is refused with `x-should-retry: false`, and isn't asked for again."""
    before = scene.refused("no_capacity")
    client = scene.client(name)
    retries = 2 if client.program.obeys else 0
    facts = client.fail("chat", model="huge", text=ASK, retries=retries)
    assert has_status(facts, 503), facts
    assert scene.refused("no_capacity") == before + 1


@pytest.mark.timeout(300)  # it may have to start all clients at once
def test_a_full_queue_is_retried_when_it_says(scene: Scene) -> None:
    """All clients are refused with 429 and Retry-After, wait for so long, and then are served."""
    clients = scene.ready(CHATTING)
    before = scene.refused("queue_full")
    with occupied(scene, "busy", 4):
        refused = scene.gateway.chat("busy")
        assert refused.status_code == 429
        said = int(refused.headers["retry-after"])
        for client in clients:
            client.begin("chat", model="busy", text=ASK, length=1, retries=4)
        wait_for(lambda: scene.refused("queue_full") > before + len(clients), "all are refused")
    for client in clients:
        facts = client.result()
        assert facts.get("text"), (client.name, facts)
        assert facts["seconds"] >= (said - 1) / 1.25, client.name  # each is told with a jitter of its own


@pytest.mark.timeout(300)  # it may have to start all clients at once
def test_comments_while_a_stream_waits(scene: Scene) -> None:
    """No client stumbles over the comments that a waiting stream is kept alive with."""
    clients = scene.ready(CHATTING)
    with occupied(scene, "line", 1):
        for client in clients:
            client.begin("chat", model="line", text=ASK, length=4, stream=True)
        wait_for(lambda: scene.gateway.queue("line")["waiting"] == len(clients), "all wait")
        with occupied(scene, "line", 1):
            pass  # it has seen its comment, so those before it have too
    for client in clients:
        facts = client.result()
        assert facts.get("text"), (client.name, facts)


@pytest.mark.timeout(300)  # it may have to start all clients at once
def test_an_error_behind_comments(scene: Scene) -> None:
    """A server's refusal behind comments, when the status has been sent already, is an error all the same."""
    clients = scene.ready(STREAMS)
    with occupied(scene, "line", 1):
        for client in clients:
            dialect = STREAMS[client.name][0]
            client.begin("read", dialect=dialect, model="line", text=ASK)
        wait_for(lambda: scene.gateway.queue("line")["waiting"] == len(clients), "all wait")
        with occupied(scene, "line", 1):
            scene.behind("line").fault("status", code=500)
    for client in clients:
        facts = client.result()
        assert "raised" in facts, (client.name, facts)
        assert "asked for" in facts["message"], (client.name, facts)
