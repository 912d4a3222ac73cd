"""Real clients send keys as each does, by `Authorization` or `x-api-key`, and understand a refusal."""

from __future__ import annotations

from tests.clients.conftest import Scene, having
from tests.clients.programs import has_status

ASK = "which way does the tide run?"


@having("chat")
def test_a_key_that_nobody_has(scene: Scene, name: str) -> None:
    """An unknown key is the client's error for that, once: no retry can help."""
    before = scene.refused("invalid_api_key")
    client = scene.client(name)
    facts = client.fail("chat", key="tg-nobody", model="chat", text=ASK, length=4, retries=2)
    assert has_status(facts, 401), facts
    assert scene.refused("invalid_api_key") == before + 1


@having("chat")
def test_a_key_for_another_model(scene: Scene, name: str) -> None:
    """A key that may ask one model only is refused for another, once, and serves for its own."""
    before = scene.refused("permission_denied")
    client = scene.client(name)
    facts = client.fail("chat", key=scene.narrow_key, model="chat", text=ASK, length=4, retries=2)
    assert has_status(facts, 403), facts
    assert scene.refused("permission_denied") == before + 1
    assert client.do("chat", key=scene.narrow_key, model="slow", text=ASK, length=1)["text"]


def test_anthropics_key_as_a_bearer(scene: Scene) -> None:
    """Anthropic's client can send its key either way; all its other tests send `x-api-key`."""
    assert scene.client("anthropic").do("chat", bearer=True, model="chat", text=ASK, length=4)["text"]
