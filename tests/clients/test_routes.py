"""Every route that real clients have answers them as the server behind would, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import IMAGE, SOUND, Scene, digest, having
from tests.clients.programs import CLIENTS
from tests.support.gateway import wait_for

ASK = "which way does the tide run?"
TEXTS = ["ebb tide", "flood tide at the lock"]


def _messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": ASK}]


@having("chat", both=True)
def test_chat(scene: Scene, name: str, stream: bool) -> None:
    """The text, the model, the reason of the end and the tokens are the server's."""
    facts = scene.client(name).do("chat", model="chat", text=ASK, stream=stream, length=8)
    assert facts["text"] == _said(scene, name)
    assert facts["model"] == "chat"
    assert facts["finish"] == ("max_tokens" if name == "anthropic" else "length")
    assert facts["tokens"] == 8


def _said(scene: Scene, name: str) -> str:
    body: dict[str, Any] = {"model": "chat", "messages": _messages(), "max_tokens": 8}
    if name == "anthropic":
        return str(scene.behind().post("/v1/messages", **body)["content"][0]["text"])
    return str(scene.behind().post("/v1/chat/completions", **body)["choices"][0]["message"]["content"])


@having("chat")
def test_chat_with_an_alias(scene: Scene, name: str) -> None:
    """A model is called by its alias."""
    facts = scene.client(name).do("chat", model="gpt-alias", text=ASK, length=8)
    assert facts["text"] == _said(scene, name)


@having("complete", both=True)
def test_completions(scene: Scene, name: str, stream: bool) -> None:
    """The text is the server's."""
    facts = scene.client(name).do("complete", model="chat", text=ASK, stream=stream)
    assert facts["text"] in _completed(scene)


def _completed(scene: Scene) -> set[str]:
    # The AI SDK turns a prompt into the words of two speakers, LangChain limits the length.
    turned = f"user:\n{ASK}\n\nassistant:\n"
    asked: list[dict[str, Any]] = [
        {"prompt": ASK},
        {"prompt": ASK, "max_tokens": 256},
        {"prompt": turned, "stop": ["\nuser:"]},
    ]
    return {
        scene.behind().post("/v1/completions", model="chat", **words)["choices"][0]["text"] for words in asked
    }


@having("embed")
def test_embeddings(scene: Scene, name: str) -> None:
    """The vectors are the server's, in whatever encoding the client asks for them."""
    facts = scene.client(name).do("embed", model="chat", texts=TEXTS)
    truth = scene.behind().post("/v1/embeddings", model="chat", input=TEXTS)
    assert facts["vectors"] == [item["embedding"] for item in truth["data"]]


@having("message", both=True)
def test_messages_by_another_client(scene: Scene, name: str, stream: bool) -> None:
    """Anthropic's messages by a client of many dialects."""
    facts = scene.client(name).do("message", model="chat", text=ASK, stream=stream)
    assert facts["text"] == _said(scene, "anthropic")


@having("count")
def test_count_tokens(scene: Scene, name: str) -> None:
    """A prompt's tokens are counted by the server."""
    facts = scene.client(name).do("count", model="chat", text=ASK)
    truth = scene.behind().post("/v1/messages/count_tokens", model="chat", messages=_messages())
    assert facts["tokens"] == truth["input_tokens"]


@having("respond", both=True)
def test_responses(scene: Scene, name: str, stream: bool) -> None:
    """The text and the state are the server's."""
    facts = scene.client(name).do("respond", model="chat", text=ASK, stream=stream)
    truth = scene.behind().post("/v1/responses", model="chat", input=ASK)
    assert facts["text"] == truth["output"][0]["content"][0]["text"]
    assert facts["state"] == "completed"


@having("keep")
def test_responses_are_fetched_and_cancelled(scene: Scene, name: str) -> None:
    """A response made in the background is fetched when it is done; one that takes long is cancelled."""
    client = scene.client(name)
    made = client.do("keep", model="chat", text=ASK, length=16)
    done = wait_for(lambda: _done(client.do("fetch", answer=made["id"])), "the response is done")
    truth = scene.behind().post("/v1/responses", model="chat", input=ASK, max_output_tokens=16)
    assert done["text"] == truth["output"][0]["content"][0]["text"]
    long = client.do("keep", model="slow", text=ASK, length=400)
    assert client.do("drop", answer=long["id"])["state"] == "cancelled"


def _done(facts: dict[str, Any]) -> dict[str, Any] | None:
    return facts if facts["state"] in ("completed", "incomplete") else None


@having("use_tool", both=True)
def test_tools(scene: Scene, name: str, stream: bool) -> None:
    """A tool is called with arguments that its schema allows, and its result is answered in words."""
    ask = "look_up the tide"
    _used(scene.client(name).do("use_tool", model="chat", text=ask, stream=stream), then=True)


@having("use_tool_in_response", both=True)
def test_tools_in_responses(scene: Scene, name: str, stream: bool) -> None:
    """A tool is called in a response."""
    ask = "look_up the tide"
    _used(scene.client(name).do("use_tool_in_response", model="chat", text=ask, stream=stream))


def _used(facts: dict[str, Any], then: bool = False) -> None:
    assert facts["tool"] == "look_up"
    assert sorted(facts["arguments"]) == ["depth", "place"]
    assert isinstance(facts["arguments"]["depth"], int)
    assert facts.get("then") or not then


@having("shape")
def test_structured_answers(scene: Scene, name: str) -> None:
    """An answer has the shape that was asked for."""
    _shaped(scene.client(name).do("shape", model="chat", text=ASK))


@having("shape_response")
def test_structured_responses(scene: Scene, name: str) -> None:
    """A response has the shape that was asked for."""
    _shaped(scene.client(name).do("shape_response", model="chat", text=ASK))


def test_structured_answers_by_a_tool(scene: Scene) -> None:
    """LangChain's other way to a structured answer: a tool that must be called."""
    client = scene.client("langchain")
    words = {"model": "chat", "text": ASK}
    _shaped(client.do("shape", method="function_calling", **words))


def _shaped(facts: dict[str, Any]) -> None:
    assert sorted(facts["value"]) == ["depth", "name"]
    assert isinstance(facts["value"]["depth"], int)


@having("transcribe", both=True)
def test_transcriptions(scene: Scene, name: str, stream: bool) -> None:
    """A sound arrives whole and is told as the server tells it."""
    streamed = {"stream": True} if stream else {}
    facts = scene.client(name).do("transcribe", model="chat", sound=SOUND, **streamed)
    assert facts["text"] == scene.behind().post_file("/v1/audio/transcriptions", SOUND)["text"]


@having("translate")
def test_translations(scene: Scene, name: str) -> None:
    """A sound is translated as the server does it."""
    facts = scene.client(name).do("translate", model="chat", sound=SOUND)
    assert facts["text"] == scene.behind().post_file("/v1/audio/translations", SOUND)["text"]


@having("speak", both=True)
def test_speech(scene: Scene, name: str, stream: bool) -> None:
    """A sound comes byte for byte, whole and as it is made."""
    streamed = {"stream": True} if stream else {}
    facts = scene.client(name).do("speak", model="chat", text=ASK, **streamed)
    assert facts["sound"] == digest(scene.behind().post("/v1/audio/speech", model="chat", input=ASK))


@having("draw")
def test_images(scene: Scene, name: str) -> None:
    """A picture is the server's."""
    facts = scene.client(name).do("draw", model="chat", text=ASK)
    truth = scene.behind().post("/v1/images/generations", model="chat", prompt=ASK, size="256x256")
    assert facts["picture"] == truth["data"][0]["b64_json"]


@having("redraw")
def test_images_of_images(scene: Scene, name: str) -> None:
    """A picture is sent in a form and another one comes back."""
    words = {"model": "chat", "text": ASK}
    client = scene.client(name)
    assert client.do("redraw", image=IMAGE, **words)["picture"] != client.do("draw", **words)["picture"]


@having("rank")
def test_ranks(scene: Scene, name: str) -> None:
    """Documents come in the server's order."""
    texts = ["stone bridge", "tide", "the tide runs which way"]
    facts = scene.client(name).do("rank", model="chat", text="the tide runs", texts=texts)
    truth = scene.behind().post("/v1/rerank", model="chat", query="the tide runs", documents=texts)
    assert facts["order"] == [result["index"] for result in truth["results"]]


@having("models")
def test_models(scene: Scene, name: str) -> None:
    """The list holds every model of the catalogue."""
    assert sorted(scene.client(name).do("models")["ids"]) == [
        "busy",
        "chat",
        "huge",
        "line",
        "slow",
    ]


@having("model")
def test_a_model(scene: Scene, name: str) -> None:
    """One model is looked up, by its alias too; one that doesn't exist is the client's error for that."""
    client = scene.client(name)
    assert client.do("model", name="chat")["id"] == "chat"
    assert client.do("model", name="gpt-alias")["id"] == "chat"
    assert client.fail("model", name="nobody")["raised"] == "NotFoundError"


@pytest.mark.parametrize("name", CLIENTS)
def test_every_route_of_a_client_is_in_the_list(scene: Scene, name: str) -> None:
    """What a program knows is what the tests above ask it for."""
    assert set(scene.client(name).do("routes")["routes"]) == CLIENTS[name].routes
