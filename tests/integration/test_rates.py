"""Rates of tenants through the whole gateway: over edges, models and restarts; what is paid in the end."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import grpc
import httpx
import pytest
import yaml

from tests.integration.test_operators import tidegate
from tests.support.gateway import BIN, Gateway, free_port, simulated, wait_for
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc
from tidegate_chassis import rpc

Make = Callable[..., Gateway]
Rated = Callable[..., Gateway]
SLACK = 1.0
"""Tokens by which rounding may hide what is left."""


@pytest.fixture
def rated(gateway: Make) -> Rated:
    """Makes a gateway with tenants, who are believed, and with control services on TCP."""

    def make(*flags: str, model: dict[str, Any] | None = None, **tenants: dict[str, int]) -> Gateway:
        one = gateway(
            {"a": simulated(*flags, **(model or {})), "b": simulated()},
            edge={"auth": "none"},
            admission={"listen": f"127.0.0.1:{free_port()}"},
            lifecycle={"listen": f"127.0.0.1:{free_port()}"},
            tenants=tenants,
        ).start()
        assert one.chat("a").status_code == 200  # it runs from now on, so that nothing below waits for a load
        return one

    return make


def chat(one: Gateway, tenant: str, port: int = 0, model: str = "a", **body: Any) -> httpx.Response:
    """One chat completion of a tenant."""
    url = f"http://127.0.0.1:{port or one.port}/v1/chat/completions"
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4} | body
    return one.http.post(url, json=body, headers={"x-tidegate-tenant": tenant})


def queued(one: Gateway, body: dict[str, Any]) -> socket.socket:
    """A request of somebody else that waits as long as its connection is open."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", one.port))
    connection.sendall(head.encode() + content)
    wait_for(lambda: one.queue(body["model"])["waiting"] == 1, "it waits")
    return connection


def left(one: Gateway, tenant: str) -> pb.RateState:
    """What admission's books say is left of a tenant's rates."""
    (state,) = [entry.rates for entry in one.books().tenants if entry.tenant == tenant]
    return state


@pytest.fixture
def second_edge(tmp_path: Path) -> Iterator[Callable[[Gateway], int]]:
    """Starts another edge on the same admission and lifecycle; its port."""
    running: list[Popen[bytes]] = []

    def start(one: Gateway) -> int:
        config, port = yaml.safe_load(one.config_path.read_text()), free_port()
        edge = {
            "listen": f"127.0.0.1:{port}",
            "auth": "none",
            "admission_address": config["admission"]["listen"],
            "lifecycle_address": config["lifecycle"]["listen"],
        }
        path = tmp_path / "second.yaml"
        path.write_text(yaml.safe_dump({"edge": edge}))
        command = [str(BIN / "tidegate"), "edge", "--config", str(path)]
        running.append(Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, env=one.environ))

        def ready() -> bool:
            try:
                return one.http.get(f"http://127.0.0.1:{port}/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, "the second edge is ready")
        return port

    yield start
    for process in running:
        process.terminate()
        assert process.wait(12) == 0


def limits(answer: httpx.Response) -> dict[str, str]:
    """The fields about rates, without what they all begin with."""
    begin = "x-ratelimit-"
    return {
        name.removeprefix(begin): value for name, value in answer.headers.items() if name.startswith(begin)
    }


def test_two_edges_share_a_tenants_requests(rated: Rated, second_edge: Callable[[Gateway], int]) -> None:
    """Six a minute over both edges and both models; others know nothing of it; operators see it (A11, E5)."""
    one = rated(team={"requests_per_minute": 6})
    port = second_edge(one)
    began = time.monotonic()
    models, ports = ["a", "b", "a", "b", "a", "b"], [0, port, port, 0, port, 0]
    answers = [chat(one, "team", at, model) for at, model in zip(ports, models, strict=True)]
    assert [answer.status_code for answer in answers] == [200] * 6
    if time.monotonic() - began < 10.0:  # else one has come back meanwhile
        remaining = [int(limits(answer)["remaining-requests"]) for answer in answers]
        assert remaining == [5, 4, 3, 2, 1, 0]
    assert {limits(answer)["limit-requests"] for answer in answers} == {"6"}

    def refused() -> list[httpx.Response]:
        tried = [chat(one, "team", at) for at in (0, port, 0, port)]
        return tried if {answer.status_code for answer in tried} == {429} else []

    refusals = wait_for(refused, "all are refused, until ten seconds have brought one back")
    error = refusals[-1].json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
    assert "6 requests per minute: 0 left, 1 asked for; try again in" in error["message"]
    assert 1 <= int(refusals[-1].headers["retry-after"]) <= 15
    assert limits(refusals[-1])["remaining-requests"] == "0"
    reset = left(one, "team").requests.reset_ms
    assert 40_000 < reset <= 60_000, "what was refused has not pushed it further away"
    assert set(limits(refusals[-1])) == {"limit-requests", "remaining-requests", "reset-requests"}
    for other in ("else", "default"):
        answer = chat(one, other, port)
        assert (answer.status_code, limits(answer)) == (200, {})
    done = tidegate("queues", "--config", one.config_path)
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("team"))
    assert (row[1], row[2]) in {("0/6", "-"), ("1/6", "-")}
    books = one.books()
    assert sum(queue.ticket_ends["refused"] for queue in books.models) >= 4
    assert sum(queue.ticket_ends["granted"] for queue in books.models) >= 9
    status = one.status()
    assert status["admission"]["tenants"][0]["tenant"] == "team"


def test_what_is_refused_for_another_reason_spends_nothing(rated: Rated) -> None:
    """A full queue and an unknown model come before the rate; a client that leaves the queue gets it back."""
    one = rated(
        "--token-rate", "1", model={"max_concurrent": 1, "max_queue": 1}, team={"requests_per_minute": 2}
    )
    body = {"model": "a", "messages": [], "stream": True, "max_tokens": 500}
    headers = {"x-tidegate-tenant": "team"}
    with (
        httpx.Client(base_url=one.url, timeout=60, trust_env=False) as client,
        client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as first,
    ):
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        waiting = httpx.Client(base_url=one.url, timeout=1.0, trust_env=False)
        with waiting, pytest.raises(httpx.ReadTimeout):  # it waits, then its client leaves
            waiting.post("/v1/chat/completions", json=body | {"stream": False}, headers=headers)
        wait_for(lambda: one.queue("a")["waiting"] == 0, "its ticket has ended")
        assert left(one, "team").requests.remaining == 1
        assert chat(one, "team", model="unknown").status_code == 404
        assert left(one, "team").requests.remaining == 1
        waiters = queued(one, body | {"stream": False})
        try:
            refused = chat(one, "team")
        finally:
            waiters.close()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert limits(refused)["remaining-requests"] == "1"
    wait_for(one.is_idle, "the stream has ended")
    assert left(one, "team").requests.remaining >= 1


def test_tokens_are_settled_by_what_was_used(rated: Rated) -> None:
    """By the `usage` of an answer or a stream, else by the events of the stream; an error costs none."""
    one = rated("--max-model-len", "300", team={"tokens_per_minute": 600})  # ten come back each second
    spent, began = 0.0, time.monotonic()

    def check(what: str) -> None:
        wait_for(one.is_idle, "it is settled")
        allowance = left(one, "team").tokens
        elapsed = time.monotonic() - began
        assert 600 - spent - SLACK <= allowance.remaining <= 600 - spent + elapsed * 10 + SLACK, what

    # Each reserves some 100 tokens for its padding beyond what the model server counts.
    padded: dict[str, Any] = {"user": "x" * 400}
    answer = chat(one, "team", max_tokens=20, **padded)
    usage = answer.json()["usage"]
    assert usage["total_tokens"] < 60
    assert int(limits(answer)["remaining-tokens"]) <= 600 - 20 - 100
    spent += usage["total_tokens"]
    check("an answer with usage")

    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    answer = chat(one, "team", max_tokens=30, **options, **padded)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert events[-1]["usage"]["completion_tokens"] == 30
    spent += events[-1]["usage"]["total_tokens"]
    check("a stream with usage")

    answer = chat(one, "team", max_tokens=40, stream=True)
    events = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    assert not any('"usage":{' in event for event in events)
    assert abs(len(events) - 40) <= 2
    spent += len(events) + len(answer.request.content) // 4
    check("a stream without usage")

    assert chat(one, "team", max_tokens=299).status_code == 400  # longer than its context
    check("an error")


def test_a_debt_is_paid_before_the_next_request(rated: Rated) -> None:
    """Without a maximum it is let through by a guess; what it used beyond keeps others away."""
    one = rated("--default-tokens", "900", team={"tokens_per_minute": 600})
    body = {"model": "a", "messages": [{"role": "user", "content": "hello"}]}
    answer = one.http.post("/v1/chat/completions", json=body, headers={"x-tidegate-tenant": "team"})
    used = answer.json()["usage"]["total_tokens"]
    assert used >= 900
    wait_for(one.is_idle, "it is settled")
    refused = chat(one, "team", max_tokens=1)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "tokens"
    wait = (used - 600) / 10
    assert wait - 5 < int(refused.headers["retry-after"]) <= (wait + 5) * 1.5
    assert limits(refused)["remaining-tokens"] == "0"
    assert "m" in limits(refused)["reset-tokens"], "longer than a minute: there is a debt"


def test_a_restarted_admission_gives_no_burst(rated: Rated) -> None:
    """A first start has a full minute's worth; after kill -9 there is one request, and then the rate."""
    one = rated(team={"requests_per_minute": 4, "tokens_per_minute": 60_000})
    assert [chat(one, "team").status_code for _ in range(3)] == [200] * 3
    before = one.books().incarnation
    one.kill("admission")

    def restarted() -> bool:
        try:
            return one.books().incarnation != before
        except grpc.RpcError:
            return False

    wait_for(restarted, "admission is back")
    tokens = left(one, "team").tokens
    assert tokens.remaining < 60_000
    wait_for(lambda: left(one, "team").tokens.remaining > 100, "some tokens have come back")
    statuses = [chat(one, "team").status_code for _ in range(3)]
    assert statuses.count(200) in (1, 2), statuses  # 2: fifteen seconds have passed since
    assert statuses[-1] == 429


def test_unary_requests_are_counted_too(rated: Rated) -> None:
    """An internal service spends its tenant's rate, settles by what it says, is refused in gRPC's words."""
    one = rated(team={"requests_per_minute": 3, "tokens_per_minute": 600})
    address = yaml.safe_load(one.config_path.read_text())["admission"]["listen"]
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.AdmissionServiceStub(channel)

        def acquire(name: str, estimate: int) -> pb.AcquireResponse:
            request = pb.AcquireRequest(
                holder_id="h", request_id=name, model="a", tenant="team", token_estimate=estimate
            )
            return stub.Acquire(request, timeout=10)

        began = time.monotonic()
        lease = acquire("first", 500)
        acquire("first", 500)  # a repeat is the same lease
        assert left(one, "team").requests.remaining == 2
        assert 100 <= left(one, "team").tokens.remaining < 150
        with pytest.raises(grpc.RpcError) as refused:
            acquire("second", 400)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert rpc.reason_of(refused.value) == "REASON_RATE_LIMITED"
        assert "600 tokens per minute" in (refused.value.details() or "")
        release = pb.ReleaseRequest(
            holder_id="h", lease_id=lease.lease_id, prompt_tokens=30, completion_tokens=20
        )
        assert stub.Release(release, timeout=5).known
        assert not stub.Release(release, timeout=5).known
        settled = left(one, "team").tokens.remaining
        assert 549 <= settled <= 551 + (time.monotonic() - began) * 10
        assert left(one, "team").requests.remaining == 2
