"""Asking real HTTP servers how they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.engines import ENGINES
from tidegate_lifecycle.probes import Health, Load, Probe

METRICS = b"""# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="a } b"} 3.0
vllm:num_requests_running{engine="1",model_name="a"} 2.0
vllm:num_requests_waiting{engine="0"} 1.0
vllm:num_requests_waiting_by_reason{reason="capacity"} 9.0
"""

Serve = Callable[[dict[str, bytes]], Coroutine[Any, Any, str]]


@pytest.fixture
async def serve() -> AsyncGenerator[Serve]:
    """Starts a server that answers each path with given bytes; an unknown path is never answered."""
    servers: list[asyncio.Server] = []
    writers: list[asyncio.StreamWriter] = []

    async def start(answers: dict[str, bytes]) -> str:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            if path in answers:
                writer.write(answers[path])
                writer.close()

        servers.append(await asyncio.start_server(answer, "127.0.0.1", 0))
        return f"http://127.0.0.1:{servers[-1].sockets[0].getsockname()[1]}"

    yield start
    for writer in writers:
        writer.close()
    for server in servers:
        server.close()


@pytest.fixture
async def probe() -> AsyncGenerator[Probe]:
    """A probe that is closed again."""
    made = Probe()
    yield made
    await made.close()


def http(body: bytes = b"", status: str = "200 OK", head: str = "") -> bytes:
    """An answer."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "health"),
    [
        (http(), Health(True)),
        (http(status="204 No Content"), Health(True)),
        (http(status="503 Service Unavailable"), Health(False, "status 503")),
        (http(status="302 Found", head="Location: /ok\r\n"), Health(False, "status 302")),
        (b"SSH-2.0-nothing of the kind\r\n", Health(False, "no valid answer (RemoteProtocolError)")),
        (b"", Health(False, "no valid answer (RemoteProtocolError)")),
    ],
)
async def test_health_is_a_2xx_and_nothing_else(
    serve: Callable[..., asyncio.Future[str]], probe: Probe, answer: bytes, health: Health
) -> None:
    """Anything but a 2xx is a reason without address or path; nothing raises, no redirect is followed."""
    address = await serve({"/health": answer, "/ok": http()})
    assert await probe.get(address, "/health", 2.0) == health


async def test_silence_and_absence_end_in_time(
    serve: Callable[..., asyncio.Future[str]], probe: Probe
) -> None:
    """A server that never answers costs the timeout; one that isn't there costs nothing."""
    address = await serve({})
    assert await probe.get(address, "/health", 0.2) == Health(False, "no answer within 0.2 s")
    assert await probe.get("http://127.0.0.1:1", "/health", 5.0) == Health(False, "no connection")
    assert not (await probe.get("http://[bad", "/health", 5.0)).ok


async def test_load_is_summed_over_engines(serve: Callable[..., asyncio.Future[str]], probe: Probe) -> None:
    """vLLM's and llama.cpp's gauges are known; others, garbage and errors say nothing."""
    vllm = await serve({"/metrics": http(METRICS)})
    assert await probe.load(vllm, 2.0) == Load(5, 1)
    llama = await serve({"/metrics": http(b"llamacpp:requests_processing 1\nllamacpp:requests_deferred 2\n")})
    assert await probe.load(llama, 2.0) == Load(1, 2)
    odd = await serve(
        {"/metrics": http(b"vllm:num_requests_running{} NaN\nvllm:num_requests_waiting x\n\xff")}
    )
    assert await probe.load(odd, 2.0) == Load(None, None)
    gone = await serve({"/metrics": http(status="404 Not Found")})
    assert await probe.load(gone, 2.0) == Load(None, None)


async def test_figures_tell_whether_an_engine_moves(
    serve: Callable[..., asyncio.Future[str]], probe: Probe
) -> None:
    """Any figure of the engine counts, and none of its process."""
    answers = {"/metrics": http(METRICS)}
    address = await serve(answers)
    still = (await probe.load(address, 2.0)).figures
    answers["/metrics"] = http(METRICS + b"process_cpu_seconds_total 7.0\n")
    assert (await probe.load(address, 2.0)).figures == still
    answers["/metrics"] = http(METRICS + b"vllm:generation_tokens_total 7.0\n")
    assert (await probe.load(address, 2.0)).figures != still


async def test_a_vllm_server_is_ready_when_it_lists_the_model(
    serve: Callable[..., asyncio.Future[str]], probe: Probe
) -> None:
    """A healthy stranger on the port isn't taken for the server."""
    model, engine = Model("m", engine="vllm"), ENGINES["vllm"]
    right = await serve({"/health": http(), "/v1/models": http(b'{"data": [{"id": "x"}, {"id": "m"}]}')})
    assert (await engine.ready(probe, model, right)).ok
    stranger = await serve({"/health": http(), "/v1/models": http(b'{"data": [{"id": "x"}]}')})
    assert await engine.ready(probe, model, stranger) == Health(False, "it doesn't list this model")
    odd = await serve({"/health": http(), "/v1/models": http(b"[1]")})
    assert await engine.ready(probe, model, odd) == Health(False, "it doesn't list its models")
    loading = await serve({"/health": http(status="503 Loading")})
    assert await engine.ready(probe, model, loading) == Health(False, "status 503")
