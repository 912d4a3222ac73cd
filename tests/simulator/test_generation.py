"""Chat, completions, Responses and Messages, as clients see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.simulator.conftest import Simulated

ASK: dict[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": "which way does the tide run?"}],
}


@pytest.fixture(scope="module")
def client(shared: Simulated) -> Iterator[openai.OpenAI]:
    """openai-python, pointed at the shared simulator."""
    with openai.OpenAI(base_url=shared.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_equal_requests_get_equal_text(client: openai.OpenAI) -> None:
    """The same prompt and seed give the same text; another seed gives another; no length set ends in stop."""
    first, second = (client.chat.completions.create(**ASK) for _ in range(2))
    other = client.chat.completions.create(**ASK, seed=7)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content
    assert first.choices[0].finish_reason == "stop"


def test_max_tokens_sets_the_length(client: openai.OpenAI) -> None:
    """max_tokens is the number of tokens, counted in usage, and the end is called length."""
    answer = client.chat.completions.create(**ASK, max_tokens=5)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    """A streamed chat joins to the text of the whole one and ends with usage in a chunk without choices."""
    whole = client.chat.completions.create(**ASK, max_tokens=20)
    chunks = list(
        client.chat.completions.create(
            **ASK, max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "length"


def test_frames_of_a_stream(shared: Simulated) -> None:
    """A stream is made of data frames with vLLM's headers, and its last frame is [DONE]."""
    answer = shared.http.post("/v1/completions", json={"model": "other", "prompt": "a", "stream": True})
    frames = answer.content.split(b"\n\n")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert frames[-2:] == [b"data: [DONE]", b""]
    assert all(frame.startswith(b"data: {") for frame in frames[:-2])
    assert json.loads(frames[0][6:])["model"] == "other"
    assert not any(b'"usage"' in frame for frame in frames)


def test_stop_ends_the_text_before_it(client: openai.OpenAI) -> None:
    """A stop string cuts the text before its first place, in a stream too."""
    text = client.completions.create(model="small", prompt="p", max_tokens=20).choices[0].text
    stop = text.split(" ")[9]
    ended = client.completions.create(model="small", prompt="p", max_tokens=20, stop=stop).choices[0]
    streamed = client.completions.create(model="small", prompt="p", max_tokens=20, stop=[stop], stream=True)
    assert ended.text == text[: text.index(stop)]
    assert ended.finish_reason == "stop"
    assert "".join(chunk.choices[0].text for chunk in streamed) == ended.text


def test_each_prompt_of_a_list_gets_a_choice(client: openai.OpenAI) -> None:
    """A list of prompts gives a choice each; token ids are a prompt too."""
    answer = client.completions.create(model="small", prompt=["one", "two"], max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


def test_unknown_model(client: openai.OpenAI) -> None:
    """A model that isn't served is 404, in vLLM's envelope: `code` is the status."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**ASK, "model": "none"})
    assert caught.value.response.json() == {
        "error": {
            "message": "The model `none` does not exist.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
    }


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{not json", 400),
        (b"[]", 400),
        (b'{"model": "small"}', 400),
        (b'{"model": "small", "messages": "text"}', 400),
        (b'{"messages": [], "max_tokens": 0}', 400),
        (b'{"messages": [], "max_tokens": 1000}', 400),
        (json.dumps({"messages": [{"role": "user", "content": "x" * 4000}]}).encode(), 400),
    ],
)
def test_bad_requests(shared: Simulated, body: bytes, status: int) -> None:
    """Bad JSON, a missing or wrong field, a prompt over --max-model-len: each is a BadRequestError."""
    answer = shared.http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "BadRequestError"
    assert answer.json()["error"]["code"] == status


def test_unknown_path_and_method(shared: Simulated) -> None:
    """What isn't there is 404, another method 405, a body that isn't JSON 415, all in the envelope."""
    statuses = [
        shared.http.get("/v1/nothing").json()["error"]["code"],
        shared.http.get("/v1/completions").json()["error"]["code"],
        shared.http.post("/v1/completions", data={"a": "b"}).json()["error"]["code"],
        shared.http.post("/sleep").json()["error"]["code"],
    ]
    assert statuses == [404, 405, 415, 404]


def test_responses(client: openai.OpenAI) -> None:
    """A response is created whole, found again by its id, and 404 for another id."""
    made = client.responses.create(model="small", input="tide?")
    assert made.status == "completed"
    assert made.output_text
    assert client.responses.retrieve(made.id).output_text == made.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_none")
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(made.id)


def test_streamed_responses(client: openai.OpenAI, shared: Simulated) -> None:
    """A streamed response has named events, numbered, that end in response.completed, with no [DONE]."""
    whole = client.responses.create(model="small", input="tide?")
    events = list(client.responses.create(model="small", input="tide?", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta")
        == whole.output_text
    )
    assert events[-1].type == "response.completed"
    raw = shared.http.post("/v1/responses", json={"model": "small", "input": "tide?", "stream": True}).content
    assert raw.startswith(b"event: response.created\ndata: {")
    assert b"[DONE]" not in raw


def test_background_response_is_cancelled(simulate: Any) -> None:
    """A response in the background holds a slot until it is cancelled."""
    simulated = simulate("--ttft", "1000")
    body = {"model": "small", "input": "x", "background": True}
    made = simulated.http.post("/v1/responses", json=body).json()
    assert made["status"] == "queued"
    simulated.until(lambda seen: seen["running"] == 1)
    assert simulated.http.post(f"/v1/responses/{made['id']}/cancel").json()["status"] == "cancelled"
    simulated.until(lambda seen: seen["running"] == 0)


def test_messages(shared: Simulated) -> None:
    """Anthropic's messages are answered whole and streamed; the stream ends with message_stop."""
    body = {
        "model": "small",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    }
    whole = shared.http.post("/v1/messages", json=body).json()
    assert whole["stop_reason"] == "max_tokens"
    assert whole["usage"]["output_tokens"] == 4
    raw = shared.http.post("/v1/messages", json=body | {"stream": True}).text
    events = [block.split("\n")[0] for block in raw.split("\n\n") if block]
    assert events[0] == "event: message_start"
    assert events.count("event: content_block_delta") == 4
    assert events[-1] == "event: message_stop"
    assert shared.http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"] > 0
    refused = shared.http.post("/v1/messages", json=body | {"model": "none"})
    assert refused.status_code == 404
    assert refused.json()["type"] == "error"


def test_embeddings_in_both_encodings(client: openai.OpenAI) -> None:
    """openai-python's base64 and plain floats are the same unit vectors."""
    packed = client.embeddings.create(model="small", input=["a", "b"], dimensions=8)
    plain = client.embeddings.create(model="small", input=["a", "b"], dimensions=8, encoding_format="float")
    assert [item.embedding for item in packed.data] == [item.embedding for item in plain.data]
    assert sum(value * value for value in plain.data[0].embedding) == pytest.approx(1)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_puts_the_best_first(shared: Simulated, path: str) -> None:
    """Documents come back best first, cut to top_n."""
    body = {
        "model": "small",
        "query": "high tide",
        "documents": ["a stone", "the high tide", "tide"],
        "top_n": 2,
    }
    results = shared.http.post(path, json=body).json()["results"]
    assert [result["index"] for result in results] == [1, 2]


def test_scores_classes_and_pooling(shared: Simulated) -> None:
    """The other pooling routes answer one item for each input."""
    scores = shared.http.post("/score", json={"model": "small", "text_1": "a", "text_2": ["a", "b"]}).json()[
        "data"
    ]
    assert scores[0]["score"] > scores[1]["score"]
    assert shared.http.post("/v1/score", json={"queries": "a", "documents": "b"}).status_code == 200
    classes = shared.http.post("/classify", json={"model": "small", "input": ["a", "b"]}).json()["data"]
    assert [sum(item["probs"]) for item in classes] == pytest.approx([1, 1])
    assert len(shared.http.post("/pooling", json={"input": "a"}).json()["data"]) == 1


def test_tokens_go_back_and_forth(shared: Simulated) -> None:
    """Detokenizing what was tokenized gives the text again."""
    tokens = shared.http.post("/tokenize", json={"model": "small", "prompt": "naïve 潮 tide"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 200
    back = shared.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": "naïve 潮 tide"}


def test_audio(client: openai.OpenAI, shared: Simulated) -> None:
    """A file in a form gives a text that depends on its bytes alone."""
    sound = bytes(range(256)) * 4
    texts = [
        client.audio.transcriptions.create(model="small", file=(name, data)).text
        for name, data in (("a.wav", sound), ("b.wav", sound), ("c.wav", sound + b"\r\n"))
    ]
    assert texts[0] == texts[1] != texts[2]
    # By hand: openai-python calls its translations deprecated.
    for name, status in (("other", 200), ("none", 404)):
        answer = shared.http.post("/v1/audio/translations", data={"model": name}, files={"file": sound})
        assert answer.status_code == status


def test_models_version_and_metrics(shared: Simulated) -> None:
    """All served names are listed; the metrics carry vLLM's names."""
    assert [card["id"] for card in shared.http.get("/v1/models").json()["data"]] == ["small", "other"]
    assert "version" in shared.http.get("/version").json()
    assert shared.http.get("/load").json() == {"server_load": 0}
    page = shared.http.get("/metrics").text
    assert 'vllm:num_requests_running{model_name="small",engine="0"} 0.0' in page
    assert 'vllm:engine_sleep_state{model_name="small",engine="0",sleep_state="awake"} 1.0' in page
    assert "vllm:time_to_first_token_seconds_bucket" in page
