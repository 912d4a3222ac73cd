"""The server around the model: queue, journal, sleep, start and end."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.simulator.conftest import READY, Simulate, Simulated

CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
SLEEPY = {"VLLM_SERVER_DEV_MODE": "1"}


class Call:
    """A chat on a thread of its own."""

    def __init__(self, simulated: Simulated, **fields: Any) -> None:
        self._url = simulated.url + "/v1/chat/completions"
        self._body = CHAT | fields
        self.answer: httpx.Response | None = None
        self.error: httpx.HTTPError | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def result(self) -> httpx.Response:
        """Its answer, once it is there."""
        self._thread.join(20)
        assert self.answer is not None, self.error
        return self.answer

    def failure(self) -> httpx.HTTPError:
        """How it failed, once it has."""
        self._thread.join(20)
        assert self.error is not None
        return self.error

    def _run(self) -> None:
        try:
            self.answer = httpx.post(self._url, json=self._body, timeout=20)
        except httpx.HTTPError as error:
            self.error = error


def running(number: int, waiting: int = 0) -> Any:
    """Whether so many run and wait."""
    return lambda seen: (seen["running"], seen["waiting"]) == (number, waiting)


def test_requests_arrive_byte_for_byte(simulate: Simulate) -> None:
    """The journal shows method, path, query, headers and body as sent, and how the request ended."""
    simulated = simulate()
    body = b'{"model":"small",  "messages":[{"role":"user","content":"\xe6\xbd\xae"}]}'
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"Content-Type": "application/json", "traceparent": trace, "X-Request-Id": "abc"}
    answer = simulated.http.post("/v1/chat/completions?a=%20b&c", content=body, headers=headers)
    (seen,) = simulated.http.get("/simulator/requests", params={"path": "/v1/chat/completions"}).json()[
        "requests"
    ]
    assert answer.json()["id"] == "chatcmpl-abc"
    assert answer.headers["x-simulator-instance"] == str(simulated.process.pid)
    assert (seen["method"], seen["query"], seen["status"], seen["ended"]) == (
        "POST",
        "a=%20b&c",
        200,
        "completed",
    )
    assert seen["body"].encode() == body
    assert (seen["body_length"], seen["body_sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert ["X-Request-Id", "abc"] in seen["headers"]
    assert seen["traceparent"] == trace


def test_a_client_that_leaves_frees_its_slot(simulate: Simulate) -> None:
    """A stream whose client goes is shown as aborted, and no longer runs."""
    simulated = simulate("--token-rate", "5", "--max-num-seqs", "1")
    with simulated.http.stream(
        "POST", "/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 9999}
    ) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        simulated.until(running(1))
    seen = simulated.until(running(0))
    assert seen["requests"][-1]["ended"] == "aborted"
    assert 'finished_reason="abort"} 1.0' in simulated.http.get("/metrics").text


def test_more_than_max_num_seqs_wait(simulate: Simulate) -> None:
    """Beyond --max-num-seqs requests wait inside, in order; beyond --max-num-queued-reqs they get 503."""
    simulated = simulate("--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--ttft", "0.3")
    first = Call(simulated)
    simulated.until(running(1))
    second = Call(simulated)
    simulated.until(running(1, 1))
    page = simulated.http.get("/metrics").text
    assert "vllm:num_requests_waiting{" in page
    refused = simulated.http.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 503
    assert refused.json()["error"]["type"] == "ServiceUnavailableError"
    assert [first.result().status_code, second.result().status_code] == [200, 200]


def test_pace(simulate: Simulate) -> None:
    """--ttft and --token-rate set the least time that an answer takes."""
    simulated = simulate("--ttft", "0.1", "--token-rate", "50")
    answer = simulated.http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 6})
    assert answer.elapsed.total_seconds() >= 0.1 + 5 / 50
    lines = simulated.http.get("/metrics").text.splitlines()
    assert any(
        line.startswith("vllm:time_to_first_token_seconds_count") and line.endswith(" 1") for line in lines
    )


def test_sleeping_holds_requests_until_woken(simulate: Simulate) -> None:
    """/health is 200 while asleep, requests to a sleeper hang, and go on once it is awake."""
    simulated = simulate("--enable-sleep-mode", **SLEEPY)
    assert simulated.http.post("/sleep?level=1&mode=wait").json() == {"status": "sleeping", "level": 1}
    assert simulated.http.get("/health").status_code == 200
    assert simulated.http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert 'sleep_state="weights_offloaded"} 1.0' in simulated.http.get("/metrics").text
    held = Call(simulated)
    simulated.until(running(0, 1))
    assert simulated.http.post("/wake_up").json() == {"status": "awake"}
    assert held.result().status_code == 200


def test_sleep_modes(simulate: Simulate) -> None:
    """Mode abort ends what runs with finish_reason abort; wait lets it end; keep freezes it until woken."""
    simulated = simulate("--enable-sleep-mode", "--ttft", "1000", **SLEEPY)
    aborted = Call(simulated)
    simulated.until(running(1))
    simulated.http.post("/sleep")
    assert aborted.result().json()["choices"][0]["finish_reason"] == "abort"
    simulated.http.post("/wake_up")

    gentle = simulate("--enable-sleep-mode", "--ttft", "0.2", **SLEEPY)
    for mode in ("wait", "keep"):
        call = Call(gentle)
        gentle.until(running(1))
        gentle.http.post("/sleep", params={"mode": mode})
        gentle.until(running(0) if mode == "wait" else running(1))
        gentle.http.post("/wake_up")
        assert call.result().json()["choices"][0]["finish_reason"] == "stop"


def test_level_two_needs_its_weights_again(simulate: Simulate) -> None:
    """After level 2 the engine wakes in parts and talks gibberish until reload_weights."""
    simulated = simulate("--enable-sleep-mode", **SLEEPY)
    before = simulated.http.post("/v1/chat/completions", json=CHAT).json()["choices"]
    simulated.http.post("/sleep?level=2")
    assert simulated.http.post("/wake_up?tags=weights").json() == {"status": "sleeping"}
    assert simulated.http.post("/wake_up?tags=kv_cache").json() == {"status": "awake"}
    said = simulated.http.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    assert set(said) == {"!"}
    simulated.http.post("/collective_rpc", json={"method": "reload_weights"})
    assert simulated.http.post("/v1/chat/completions", json=CHAT).json()["choices"] == before


def test_sleep_routes_need_flag_and_environment(simulate: Simulate) -> None:
    """Without VLLM_SERVER_DEV_MODE=1 there is no /sleep."""
    simulated = simulate("--enable-sleep-mode", VLLM_SERVER_DEV_MODE="0")
    assert simulated.http.post("/sleep").status_code == 404
    assert simulated.http.get("/is_sleeping").status_code == 404


def test_port_is_closed_until_loaded(simulate: Simulate, tmp_path: Path) -> None:
    """While it loads nobody is let in, as with vLLM; llama-server's form answers 503 meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    loading = simulate.start("--port", str(port), "--fault", "hang-at-start")
    loading.line("Loading weights")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    assert loading.terminate() == 0

    llama = simulate.start(
        "-m", "some.gguf", "--alias", "tiny", "--port", "0", "-ngl", "99", "--fault", "hang-at-start"
    )
    assert llama.http.get("/health").status_code == 503


def test_llama_server_form(simulate: Simulate) -> None:
    """llama-server's flags name the model, its context and its slots."""
    llama = simulate.start(
        "-m", "some.gguf", "--alias", "tiny", "--port", "0", "-c", "128", "-np", "2", "-ngl", "99"
    )
    llama.line(READY)
    (card,) = llama.http.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", 128)


def test_vllm_form(simulate: Simulate) -> None:
    """`serve MODEL` takes vLLM's flags, warns about those it doesn't know, and prints vLLM's lines."""
    simulated = simulate.start(
        *("serve", "org/model", "--port", "0", "--served-model-name", "a", "b", "--max_model_len", "4k"),
        *("--max-num-seqs", "8", "--dtype", "auto", "--tensor-parallel-size", "1", "--log-lines", "2"),
        *("--gpu-memory-utilization", "0.5", "--kv-cache-memory-bytes", "2G", "--shutdown-timeout", "1"),
        *("--otlp-traces-endpoint", "http://127.0.0.1:1", "--new-flag", "3"),
    )
    simulated.line(READY)
    (card, _) = simulated.http.get("/v1/models").json()["data"]
    assert (card["id"], card["root"], card["max_model_len"]) == ("a", "org/model", 4000)
    assert "--new-flag 3" in simulated.line("ignored")
    for part in (
        "shards: 2/2",
        "Model loading took",
        "Available KV cache memory",
        "GPU KV cache size: 16,384",
    ):
        simulated.line(part)


def test_plain_form_refuses_unknown_flags(simulate: Simulate) -> None:
    """Outside `serve` an unknown flag is a mistake."""
    simulated = simulate.start("--port", "0", "--new-flag", "3")
    assert simulated.wait() == 2


def test_taken_port_fails_at_once(simulate: Simulate) -> None:
    """A port that another has ends the start, before any loading."""
    first = simulate()
    second = simulate.start("--port", first.url.rpartition(":")[2], "--load-time", "1000")
    assert second.wait() == 1
    second.line("OSError")


def test_api_key_guards_what_vllm_guards(simulate: Simulate) -> None:
    """A key is asked for under /v1 and not elsewhere."""
    simulated = simulate("--api-key", "secret")
    assert simulated.http.get("/v1/models").json() == {"error": "Unauthorized"}
    assert simulated.http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert simulated.http.post("/score", json={"text_1": "a", "text_2": "b"}).status_code == 200


def test_unix_socket(simulate: Simulate, tmp_path: Path) -> None:
    """--uds listens on a path."""
    path = str(tmp_path / "engine")
    simulate("--uds", path)
    with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://engine") as client:
        assert client.get("/health").status_code == 200


def test_sigterm_cuts_what_is_in_flight(simulate: Simulate) -> None:
    """By default SIGTERM breaks requests at once and the exit status is 0."""
    simulated = simulate("--ttft", "1000")
    call = Call(simulated)
    simulated.until(running(1))
    assert simulated.terminate() == 0
    assert isinstance(call.failure(), httpx.RemoteProtocolError | httpx.ReadError)


def test_shutdown_timeout_lets_requests_end(simulate: Simulate) -> None:
    """With --shutdown-timeout a request in flight ends well, while no other is let in."""
    simulated = simulate("--ttft", "0.5", "--shutdown-timeout", "10")
    call = Call(simulated)
    simulated.until(running(1))
    simulated.process.send_signal(signal.SIGTERM)
    simulated.line("Shutting down")
    assert simulated.http.post("/v1/chat/completions", json=CHAT).status_code == 503
    with pytest.raises(httpx.ConnectError):
        httpx.get(simulated.url + "/health")
    assert call.result().status_code == 200
    assert simulated.wait() == 0


def test_ignored_sigterm(simulate: Simulate) -> None:
    """With --ignore-sigterm only SIGKILL ends it."""
    simulated = simulate("--ignore-sigterm")
    os.kill(simulated.process.pid, signal.SIGTERM)
    simulated.line("SIGTERM ignored")
    assert simulated.http.get("/health").status_code == 200
