"""Answers of a real vLLM, direct and through the gateway: the same bytes on every route that it serves.

Needs the executable and a model, named by the environment (CONTRIBUTING.md). The model is loaded with dummy
weights and asked at temperature 0, so that the same question has the same answer.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest

from tests.support.figures import Figures
from tests.support.gateway import Gateway, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Héllo, wörld 🙂"}]
SHORT = {"temperature": 0, "max_tokens": 12, "seed": 1, "ignore_eos": True}
GENERATE: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": HELLO, **SHORT}),
    "chat with choices": (CHAT, {"messages": HELLO, **SHORT, "logprobs": True, "n": 2, "temperature": 0.5}),
    "completion": (COMPLETIONS, {"prompt": "Once upon", **SHORT}),
    "completions of a batch": (COMPLETIONS, {"prompt": ["a", "b"], **SHORT, "echo": True}),
    "response": ("/v1/responses", {"input": "Hi", "temperature": 0, "max_output_tokens": 8, "store": False}),
    "message": ("/v1/messages", {"messages": HELLO, "max_tokens": 8, "temperature": 0}),
}
"""Asked streaming and not."""
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens of a message": ("/v1/messages/count_tokens", {"messages": HELLO}),
    "tokenize": ("/tokenize", {"prompt": "Héllo"}),
    "tokenize a chat": ("/tokenize", {"messages": HELLO}),
    "detokenize": ("/detokenize", {"tokens": [72, 101]}),
    "a bad parameter": (CHAT, {"messages": HELLO, "temperature": -7}),
    "no messages": (CHAT, {}),
    "too long": (COMPLETIONS, {"prompt": "a" * 5000, "max_tokens": 5}),
    "no embeddings here": ("/v1/embeddings", {"input": "x"}),
    "a stream that is refused": (CHAT, {"messages": HELLO, "temperature": -7, "stream": True}),
}
POOLING: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("/v1/embeddings", {"input": "Héllo"}),
    "embeddings in base64": ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    "pooling": ("/pooling", {"input": "x"}),
    "score": ("/score", {"text_1": "a", "text_2": ["b", "c"]}),
    "v1 score": ("/v1/score", {"text_1": "a", "text_2": "b"}),
    "rerank": ("/rerank", {"query": "a", "documents": ["b", "c"]}),
    "v1 rerank": ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
    "v2 rerank": ("/v2/rerank", {"query": "a", "documents": ["b", "c"]}),
    "tokens": ("/tokenize", {"prompt": "x"}),
}
TRIES = 20
_VARIES = re.compile(
    rb'"(created|created_at|completed_at|started_at)": ?[0-9.]+'
    rb"|(chatcmpl|cmpl|resp|msg|embd|pool|score|rerank|rs|item)[_-][0-9a-f-]{16,}(-[0-9]+)?"
)
"""Times and ids, where they aren't made of the request's id."""
_OWN = re.compile(
    r"date|connection|keep-alive|transfer-encoding|content-length|x-request-id|x-tidegate-.*|x-queue-depth"
    r"|x-max-.*|x-accel-buffering"
)
"""Fields of one connection, and those that the edge adds."""


class Said(NamedTuple):
    """An answer, but for what differs from one request to the next."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


def _server(*flags: str) -> dict[str, Any]:
    """A model served by the real thing, on this machine's processor."""
    vllm, model = os.environ["TIDEGATE_TEST_VLLM"], os.environ["TIDEGATE_TEST_VLLM_MODEL"]
    command = [
        vllm,
        "serve",
        model,
        "--served-model-name",
        "{name}",
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
    ]
    command += ["--load-format", "dummy", "--dtype", "float32", "--max-model-len", "2048"]
    command += ["--max-num-seqs", "4", "--enforce-eager", *flags]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
    }
    return {"engine": "command", "command": command, "vram": "20GiB", "start_timeout": "10m", "env": env}


def _leader(one: Gateway, model: str) -> int:
    """The server's first process."""
    found = [pid for pid, words in one.processes().items() if f"--served-model-name\0{model}\0" in words]
    return next(pid for pid in found if os.getpgid(pid) == pid)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway before two servers: one generates, one embeds."""
    config: dict[str, Any] = {
        "models": {"tiny": _server(), "embedder": _server("--runner", "pooling", "--convert", "embed")},
        "lifecycle": {"devices": [{"id": name, "memory": "24GiB"} for name in ("gpu0", "gpu1")]},
        "edge": {"auth": "none"},
        "admission": {"queue_timeout": "10m"},
    }
    made = Gateway(tmp_path_factory.mktemp("vllm"), config).start()
    made.http.timeout = httpx.Timeout(600)

    def load(name: str) -> int:
        return made.http.post("/tokenize", json={"model": name, "prompt": "x"}).status_code

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(load, config["models"])) == [200, 200], made.log()
    yield made
    made.close()


def ask(url: str, path: str, body: dict[str, Any], request_id: str) -> Said:
    """One question, to the server or to the gateway."""
    headers = {"x-request-id": request_id}
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        answer = client.post(path, json=body, headers=headers)
    fields = sorted((name, value) for name, value in answer.headers.items() if not _OWN.fullmatch(name))
    return Said(answer.status_code, fields, _VARIES.sub(b"*", answer.content))


def compare(one: Gateway, model: str, path: str, body: dict[str, Any]) -> Said:
    """Asks both until they say the same: at the first time, but for streams. In these vLLM puts tokens
    together when its processor is busy, so that two direct answers may differ, too."""
    address = next(found["address"] for found in one.instances() if found["model"] == model)
    question = {"model": model, **body}
    direct: list[Said] = []
    for _ in range(TRIES if body.get("stream") else 1):
        direct.append(ask(address, path, question, "0123456789abcdef"))
        relayed = ask(one.url, path, question, "0123456789abcdef")
        if relayed in direct:
            return relayed
    assert relayed == direct[-1]
    return relayed


@pytest.mark.parametrize("name", GENERATE)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_generated_is_the_same_byte_for_byte(one: Gateway, name: str, stream: bool) -> None:
    """Each route, streaming and not, and the stream's end in its dialect."""
    path, body = GENERATE[name]
    said = compare(one, "tiny", path, {**body, "stream": stream})
    assert said.status == 200, said
    assert dict(said.headers)["content-type"].startswith(
        "text/event-stream" if stream else "application/json"
    )
    if stream:
        ends = {"/v1/responses": b"response.completed", "/v1/messages": b"message_stop"}
        assert ends.get(path, b"data: [DONE]\n\n") in said.body


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_answered_at_once_is_the_same_byte_for_byte(one: Gateway, name: str) -> None:
    """Errors of vLLM's own too, as the answer to a stream too."""
    path, body = PLAIN[name]
    said = compare(one, "tiny", path, body)
    assert (said.status == 200) == ("toke" in name), said


@pytest.mark.parametrize("name", POOLING)
def test_what_is_pooled_is_the_same_byte_for_byte(one: Gateway, name: str) -> None:
    """Embeddings, scores and ranks."""
    path, body = POOLING[name]
    said = compare(one, "embedder", path, body)
    assert said.status == 200, said


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_tokens_of_a_stream_are_counted_as_vllm_counts_them(one: Gateway, path: str, usage: bool) -> None:
    """By the usage that it tells; without one, by its events."""

    def counted() -> float:
        figures = Figures(one.http.get("/metrics").text)
        return figures.total("tidegate_edge_tokens_total", model="tiny", direction="completion")

    body = {**GENERATE["chat" if path == CHAT else "completion"][1], "model": "tiny", "stream": True}
    if usage:
        body["stream_options"] = {"include_usage": True}
    before = counted()
    answer = one.http.post(path, json=body)
    assert answer.status_code == 200
    assert (b'"usage"' in answer.content) == usage
    wait_for(lambda: counted() - before == 12, f"12 tokens: {counted() - before}")


def test_a_stream_ends_with_an_error_when_its_server_is_killed(one: Gateway) -> None:
    """kill -9 of the real thing in mid-stream: an error in the stream's dialect."""
    body = {**GENERATE["chat"][1], "model": "tiny", "stream": True, "max_tokens": 1900}
    leader = _leader(one, "tiny")
    with one.http.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["object"] == "chat.completion.chunk"
        os.killpg(leader, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] in ("upstream_error", "lease_lost")
