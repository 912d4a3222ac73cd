"""What a user sees: models answer, one makes room for another, and bad requests get clear answers."""

from __future__ import annotations

import concurrent.futures
import json
import signal
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.support.gateway import Gateway, simulated, wait_for

Make = Callable[..., Gateway]


def _client(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60)


def _messages(text: str = "hello") -> list[Any]:
    return [{"role": "user", "content": text}]


def test_openai_client_against_two_models_and_a_third_that_evicts_one(gateway: Make) -> None:
    """The openai client chats with two models, streaming and not; a third one makes room for itself."""
    one = gateway({name: simulated("--default-tokens", "8") for name in ("a", "b", "c")}).start()
    with _client(one) as client:
        assert {model.id for model in client.models.list()} == {"a", "b", "c"}
        for name in ("a", "b"):
            answer = client.chat.completions.create(model=name, messages=_messages())
            assert answer.model == name
            assert answer.choices[0].message.content
            stream = client.chat.completions.create(
                model=name, messages=_messages(), stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == answer.choices[0].message.content
            assert chunks[-1].usage is not None
        assert len(one.servers()) == 2
        client.chat.completions.create(model="b", messages=_messages())
        assert client.chat.completions.create(model="c", messages=_messages()).model == "c"
    states = {name: model["state"] for name, model in one.status()["models"].items()}
    assert states["c"] == "ready"
    assert sorted(states[name] for name in "ab") == ["ready", "stopped"], "one of the two goes"
    wait_for(lambda: len(one.servers()) == 2, "the evicted server has gone")


def test_hundred_callers_for_a_cold_model_start_it_once(gateway: Make) -> None:
    """A hundred callers of a stopped model share one start, and all are answered."""
    one = gateway({"a": simulated("--load-time", "0.5", max_concurrent=8)}).start()
    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: one.chat("a").status_code, range(100)))
    assert answers == [200] * 100
    assert one.status()["models"]["a"]["loads"] == 1
    assert wait_for(one.is_idle, "counts return to 0")


def test_a_full_queue_answers_429_at_once(gateway: Make) -> None:
    """Beyond slots and queue a request is refused at once, with Retry-After and the queue's numbers."""
    one = gateway({"a": simulated("--ttft", "3", max_concurrent=1, max_queue=1)}).start()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(one.chat, "a")
        wait_for(lambda: not one.is_idle(), "the first one is in")
        wait_for(lambda: one.queue("a")["active"] == 1, "it holds the slot")
        second = pool.submit(one.chat, "a")
        wait_for(lambda: one.queue("a")["waiting"] == 1, "the second waits")
        third = one.chat("a")
        assert third.status_code == 429
        assert third.elapsed.total_seconds() < 1
        assert third.json()["error"]["code"] == "queue_full"
        assert 1 <= int(third.headers["retry-after"]) <= 120
        assert third.headers["x-queue-depth"] == "1"
        assert third.headers["x-max-concurrent"] == "1"
        assert third.headers["x-max-queue-size"] == "1"
        assert first.result().status_code == second.result().status_code == 200
    assert wait_for(one.is_idle, "counts return to 0")


def test_bytes_pass_unchanged_but_for_the_models_name(gateway: Make) -> None:
    """The body arrives byte for byte, with only the value of `model` replaced by the upstream's name."""
    model = simulated("--model", "inner", aliases=["other"], upstream_model="inner")
    one = gateway({"outer": model}).start()
    body = b'{ "messages" : [{"role":"user","content":"\\u00e4 \\"model\\": 1"}],\t"model" : "other"}'
    headers = {"content-type": "application/json", "x-custom": "Kept", "x-request-id": "mine-1"}
    answer = one.http.post("/v1/chat/completions?a=b%20c", content=body, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine-1"
    (server,) = one.instances()
    seen = httpx.get(f"{server['address']}/simulator/requests", trust_env=False).json()
    request = next(entry for entry in seen["requests"] if entry["path"] == "/v1/chat/completions")
    assert request["query"] == "a=b%20c"
    assert request["body"].encode() == body.replace(b'"other"', b'"inner"')
    sent = {name.lower(): value for name, value in request["headers"]}
    assert sent["x-custom"] == "Kept"
    assert "connection" not in sent or sent["connection"] == "keep-alive"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_request_error"),
        (b"[]", 400, "invalid_request_error"),
        (b'{"messages": []}', 400, "invalid_request_error"),
        (b'{"model": 7}', 400, "invalid_request_error"),
        (b'{"model": "a", "model": "b"}', 400, "invalid_request_error"),
        (b'{"model": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "invalid_request_error"),
        (b'{"model": "nobody"}', 404, "model_not_found"),
        (b'{"model": "a", "x": "' + b"x" * 5000 + b'"}', 413, "body_too_large"),
    ],
)
def test_bad_bodies_get_a_clear_answer(shared: Gateway, body: bytes, status: int, code: str) -> None:
    """Bad JSON, no model, unknown model, duplicates, nesting and size are answered in OpenAI's envelope."""
    if len(body) > 4096 and status == 400:
        body = b'{"model": "a", "x": ' + b"[" * 1500 + b"]" * 1500 + b"}"
    answer = shared.http.post("/v1/chat/completions", content=body)
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert set(error) == {"message", "type", "param", "code"}
    assert code in (error["code"], error["type"])
    assert len(error["message"]) < 400
    assert answer.headers["x-request-id"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One gateway for tests that change nothing."""
    config = {"models": {"a": simulated()}, "edge": {"max_body": "4KiB"}}
    one = Gateway(tmp_path_factory.mktemp("shared"), config).start()
    yield one
    one.close()


@pytest.mark.parametrize(
    "path", ["/sleep", "/collective_rpc", "/v1/../sleep", "//sleep", "/v1/%2e%2e/sleep", "/metrics/", "/v1/x"]
)
def test_only_allowed_routes_exist(shared: Gateway, path: str) -> None:
    """A model server's operating routes can't be reached, however the path is written."""
    request = shared.http.build_request("POST", "/", json={"model": "a"})
    request.url = httpx.URL(shared.url).copy_with(raw_path=path.encode())
    answer = shared.http.send(request)
    assert answer.status_code in (404, 405), answer.text
    assert answer.json()["error"]["message"]


def test_a_model_that_fails_to_start_answers_503_with_the_reason(gateway: Make) -> None:
    """The server's last words are in the answer; paths, environment and secrets are not."""
    broken = simulated("--fault", "oom-at-start", env={"HF_TOKEN": "hf_secretsecretsecret"})
    one = gateway({"a": broken}).start()
    answer = one.chat("a")
    assert answer.status_code == 503
    assert "memory" in answer.json()["error"]["message"].lower()
    assert "/" not in answer.json()["error"]["message"].replace("tokens/s", "")
    assert "hf_secret" not in answer.text + one.log()
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert wait_for(one.is_idle, "nothing is left waiting")


def test_a_client_that_leaves_frees_everything(gateway: Make) -> None:
    """Leaving while loading, while queued and in mid-stream ends the upstream call and returns all counts."""
    one = gateway(
        {
            "slow": simulated("--load-time", "1.5"),
            "busy": simulated("--token-rate", "5", max_concurrent=1),
        }
    ).start()
    with pytest.raises(httpx.ReadTimeout):
        one.http.post("/v1/chat/completions", json={"model": "slow", "messages": []}, timeout=0.3)
    body = {"model": "busy", "messages": _messages(), "stream": True, "max_tokens": 1000}
    with one.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            one.http.post("/v1/chat/completions", json=body | {"stream": False}, timeout=0.3)
    assert wait_for(one.is_idle, "counts return to 0", 5)
    servers = one.instances()
    (busy,) = (server for server in servers if server["model"] == "busy")
    wait_for(lambda: "num_requests_running" in _metrics(busy["address"]), "the server tells its load")
    wait_for(lambda: _running(busy["address"]) == 0, "the server runs nothing any more", 5)


def _metrics(address: str) -> str:
    return httpx.get(f"{address}/metrics", trust_env=False).text


def _running(address: str) -> float:
    for line in _metrics(address).splitlines():
        if line.startswith("vllm:num_requests_running"):
            return float(line.rsplit(" ", 1)[1])
    return -1


def test_upstream_dying_in_mid_stream_is_said_in_the_stream(gateway: Make) -> None:
    """A server that dies after some chunks ends the stream with an error event, and is started again."""
    one = gateway({"a": simulated("--fault", "die-after=3")}).start()
    body = {"model": "a", "messages": _messages(), "stream": True, "max_tokens": 50}
    with one.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        text = "".join(stream.iter_text())
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["message"]
    assert wait_for(one.is_idle, "counts return to 0")
    assert one.chat("a", max_tokens=1).status_code == 200


def test_an_idle_model_is_stopped(gateway: Make) -> None:
    """A model nobody uses is stopped after its idle timeout, and starts again when it is asked for."""
    one = gateway({"a": simulated(idle_timeout="1s")}).start()
    assert one.chat("a").status_code == 200
    wait_for(lambda: not one.servers(), "the idle server has gone")
    assert one.chat("a").status_code == 200


def test_ctrl_c_leaves_nothing_behind(gateway: Make) -> None:
    """SIGINT ends services and model servers within 10 s, a running stream included."""
    one = gateway({"a": simulated("--token-rate", "5"), "b": simulated("--ignore-sigterm")}).start()
    one.chat("b")
    body = {"model": "a", "messages": _messages(), "stream": True, "max_tokens": 1000}
    with one.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert one.stop(signal.SIGINT, within=10) == 0
        rest = [line for line in lines if line.startswith("data: ")]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]
    assert not one.processes()


def test_models_that_cannot_share_the_card_take_turns(gateway: Make) -> None:
    """Three are wanted all the time: each gets its turns, nothing running is cut, and swaps stay few."""
    lifecycle = {"min_residency": "500ms", "max_swap_wait": "2s"}
    models = {
        name: simulated("--token-rate", "20", vram="18GiB", max_concurrent=2, max_queue=100) for name in "abc"
    }
    one = gateway(models, lifecycle=lifecycle).start()
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda i: one.chat("abc"[i % 3], max_tokens=6), range(48)))
    assert [answer.status_code for answer in answers] == [200] * 48
    loads = {name: model["loads"] for name, model in one.status()["models"].items()}
    assert min(loads.values()) >= 1
    assert sum(loads.values()) <= 12, loads
    assert wait_for(one.is_idle, "counts return to 0")
