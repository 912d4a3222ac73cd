"""Each fault, set on the command line or on a running simulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.simulator.conftest import READY, Simulate, Simulated
from tidegate_simulator.faults import parse_fault

CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}


def ask(simulated: Simulated, **options: Any) -> httpx.Response:
    """A chat."""
    return simulated.http.post("/v1/chat/completions", json=CHAT, **options)


def streamed(simulated: Simulated) -> tuple[bytes, httpx.HTTPError | None]:
    """What came of a streamed chat, and what broke it."""
    got = b""
    try:
        with simulated.http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
            for piece in answer.iter_raw():
                got += piece
    except httpx.HTTPError as error:
        return got, error
    return got, None


def texts(raw: bytes) -> list[str]:
    """The pieces of text in a stream's whole frames."""
    frames = [frame[6:] for frame in raw.split(b"\n\n")[:-1] if frame.startswith(b"data: {")]
    chunks = [json.loads(frame) for frame in frames]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk.get("choices")]
    return [delta["content"] for delta in deltas if delta.get("content")]


def test_refuse_strikes_as_often_as_told(simulate: Simulate) -> None:
    """refuse closes the connection before any byte; `after` lets requests past first, `times` ends it."""
    simulated = simulate("--fault", "refuse=1,times=1")
    assert ask(simulated).status_code == 200
    with pytest.raises(httpx.HTTPError):
        ask(simulated)
    assert ask(simulated).status_code == 200
    ended = [entry["ended"] for entry in simulated.http.get("/simulator/requests").json()["requests"]]
    assert ended == ["completed", "aborted", "completed"]


def test_hang(simulate: Simulate) -> None:
    """hang accepts the request and never answers; the journal shows it running until the client goes."""
    simulated = simulate()
    simulated.fault("hang")
    with pytest.raises(httpx.ReadTimeout):
        ask(simulated, timeout=0.2)
    simulated.until(lambda seen: seen["requests"][-1]["ended"] == "aborted")
    assert simulated.http.get("/health").status_code == 200
    simulated.http.delete("/simulator/faults")
    assert ask(simulated).status_code == 200


def test_garbage(simulate: Simulate) -> None:
    """garbage answers with bytes that aren't HTTP."""
    simulated = simulate("--fault", "garbage")
    with pytest.raises(httpx.RemoteProtocolError):
        ask(simulated)


def test_status(simulate: Simulate) -> None:
    """status answers that status in vLLM's envelope, with Retry-After where asked, on any path named."""
    simulated = simulate("--fault", "status=429,retry_after=7,times=1")
    answer = ask(simulated)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json()["error"]["code"] == 429
    simulated.fault("status", code=500, path="/v1/models")
    assert simulated.http.get("/v1/models").status_code == 500
    assert ask(simulated).status_code == 200


def test_slow_headers(simulate: Simulate) -> None:
    """slow-headers keeps the first byte back for its delay."""
    simulated = simulate("--fault", "slow-headers=0.2")
    assert ask(simulated).elapsed.total_seconds() >= 0.2


def test_cut_after(simulate: Simulate) -> None:
    """cut-after breaks one connection after so many chunks of text; the server lives on."""
    simulated = simulate("--fault", "cut-after=3,times=1")
    got, error = streamed(simulated)
    assert isinstance(error, httpx.RemoteProtocolError | httpx.ReadError)
    assert len(texts(got)) == 3
    assert streamed(simulated)[1] is None


def test_cut_of_a_whole_answer(simulate: Simulate) -> None:
    """cut-after on an answer that isn't a stream leaves it half sent."""
    simulated = simulate("--fault", "cut-after=3")
    with pytest.raises(httpx.RemoteProtocolError):
        ask(simulated)


def test_die_after(simulate: Simulate) -> None:
    """die-after ends the process in mid-stream after so many chunks of text."""
    simulated = simulate("--fault", "die-after=2")
    got, error = streamed(simulated)
    assert error is not None
    assert len(texts(got)) == 2
    assert simulated.wait() == 1


def test_stall_after(simulate: Simulate) -> None:
    """stall-after goes silent in mid-stream without closing."""
    simulated = simulate()
    simulated.fault("stall-after", after=1)
    with (
        pytest.raises(httpx.ReadTimeout),
        simulated.http.stream(
            "POST", "/v1/chat/completions", json=CHAT | {"stream": True}, timeout=0.2
        ) as answer,
    ):
        answer.read()
    simulated.until(lambda seen: seen["running"] == 0)


def test_error_after(simulate: Simulate) -> None:
    """error-after writes vLLM's error into the stream, then [DONE]."""
    simulated = simulate("--fault", "error-after=1")
    got, error = streamed(simulated)
    assert error is None
    assert json.loads(got.split(b"\n\n")[-3][6:])["error"]["type"] == "InternalServerError"
    assert got.endswith(b"data: [DONE]\n\n")


def test_torn_character(simulate: Simulate) -> None:
    """mid-utf8 breaks the connection inside a character of several bytes."""
    simulated = simulate("--fault", "mid-utf8=1")
    got, error = streamed(simulated)
    assert error is not None
    with pytest.raises(UnicodeDecodeError):
        got.decode()


def test_no_done(simulate: Simulate) -> None:
    """no-done ends a stream in good order but without [DONE]."""
    simulated = simulate("--fault", "no-done")
    got, error = streamed(simulated)
    assert error is None
    assert b"[DONE]" not in got


def test_unhealthy(simulate: Simulate) -> None:
    """unhealthy makes /health say 503, for as many polls as told."""
    simulated = simulate()
    simulated.fault("unhealthy", times=1)
    assert simulated.http.get("/health").status_code == 503
    assert simulated.http.get("/health").status_code == 200


def test_first_starts_fail(simulate: Simulate, tmp_path: Path) -> None:
    """exit-at-start=2 with a start counter fails two starts with a traceback; the third serves."""
    arguments = ("--port", "0", "--fault", "exit-at-start=2", "--start-counter", str(tmp_path / "starts"))
    for _ in range(2):
        failed = simulate.start(*arguments)
        assert failed.wait() == 1
        failed.line("Traceback")
    simulate.start(*arguments).line(READY)


def test_out_of_memory_at_start(simulate: Simulate) -> None:
    """oom-at-start ends with PyTorch's line and status 1."""
    failed = simulate.start("--port", "0", "--fault", "oom-at-start")
    assert failed.wait() == 1
    failed.line("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate")


def test_hang_at_start_can_be_killed(simulate: Simulate) -> None:
    """hang-at-start holds the port without listening, and still ends at SIGTERM."""
    hanging = simulate.start("--port", "0", "--fault", "hang-at-start")
    hanging.line("Loading weights")
    assert hanging.terminate() == 0


@pytest.mark.parametrize("text", ["nothing", "status=x", "cut-after=1,often=2", "status=700", "refuse,times"])
def test_bad_faults_are_refused(text: str) -> None:
    """A fault with an unknown name, field or value is an error, not ignored."""
    with pytest.raises(ValueError, match=r"."):
        parse_fault(text)


def test_bad_fault_at_run_time(simulate: Simulate) -> None:
    """The route refuses what the flag refuses."""
    simulated = simulate()
    assert simulated.http.post("/simulator/faults", json={"fault": "nothing"}).status_code == 400
    assert simulated.http.get("/simulator/faults").json() == {"faults": []}
