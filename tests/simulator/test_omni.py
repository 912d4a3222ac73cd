"""Speech, images and Cohere's embeddings."""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib
from collections.abc import Iterator

import openai
import pytest

from tests.simulator.conftest import Simulated


@pytest.fixture(scope="module")
def client(shared: Simulated) -> Iterator[openai.OpenAI]:
    """openai-python, pointed at the shared simulator."""
    with openai.OpenAI(base_url=shared.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_speech_is_a_sound(client: openai.OpenAI) -> None:
    """A WAV file as long as its text needs, other words sound otherwise; `pcm` is the same without a head."""
    whole = client.audio.speech.create(
        model="small", voice="alloy", input="x" * 40, response_format="wav"
    ).read()
    with wave.open(io.BytesIO(whole)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (24000, 1, 2)
        assert sound.getnframes() == 10 * 480
    raw = client.audio.speech.create(
        model="small", voice="alloy", input="x" * 40, response_format="pcm"
    ).read()
    assert raw == whole[44:]
    other = client.audio.speech.create(
        model="small", voice="alloy", input="y" * 40, response_format="pcm"
    ).read()
    assert other != raw
    with pytest.raises(openai.BadRequestError):
        client.audio.speech.create(model="small", voice="alloy", input="x", response_format="mp3")


def _picture(encoded: str | None) -> tuple[int, int, bytes]:
    png = base64.b64decode(encoded or "")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    length = struct.unpack(">I", png[33:37])[0]
    rows = zlib.decompress(png[41 : 41 + length])
    assert len(rows) == (1 + 3 * width) * height
    return width, height, rows[1:4]


def test_images_are_pictures(client: openai.OpenAI) -> None:
    """As many as asked for, of the size asked for, each another; an edit looks at the image it was given."""
    made = client.images.generate(model="small", prompt="tide", n=2, size="256x256").data or []
    first, second = (_picture(image.b64_json) for image in made)
    assert first[:2] == second[:2] == (256, 256)
    assert first != second
    edits = [
        client.images.edit(model="small", prompt="tide", image=image, size="256x256").data or []
        for image in (b"one", b"two")
    ]
    colours = {_picture(edit[0].b64_json)[2] for edit in edits}
    assert len(colours | {first[2]}) == 3
    with pytest.raises(openai.BadRequestError):
        client.images.generate(model="small", prompt="tide", n=11)


def test_coheres_embeddings(shared: Simulated) -> None:
    """/v2/embed gives the vectors of /v1/embeddings in Cohere's words, in both encodings."""
    texts = ["ebb", "flow"]
    plain = shared.http.post("/v1/embeddings", json={"model": "small", "input": texts}).json()
    vectors = [item["embedding"] for item in plain["data"]]
    body = {"model": "small", "texts": texts, "embedding_types": ["float", "base64"]}
    answer = shared.http.post("/v2/embed", json=body).json()
    assert answer["embeddings"]["float"] == vectors
    packed = [base64.b64decode(text) for text in answer["embeddings"]["base64"]]
    assert [list(struct.unpack(f"<{len(data) // 4}f", data)) for data in packed] == vectors
    assert answer["texts"] == texts
    refused = shared.http.post("/v2/embed", json=body | {"embedding_types": ["int8"]})
    assert refused.status_code == 400
