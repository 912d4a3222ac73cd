"""Spans of the edge, received over real OTLP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.edge.conftest import CHAT, Make
from tests.edge.fakes import Connection, ask, echo
from tests.support.collector import Collector, Received
from tests.support.until import until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


async def spans(collector: Collector, count: int) -> list[Received]:
    found: list[Received] = await until(
        lambda: collector.spans() if len(collector.spans()) >= count else None, f"{count} spans"
    )
    return found


async def test_a_trace_goes_on_to_ticket_and_model_server(bench: Make, collector: Collector) -> None:
    """Caller → server span (told with the ticket) → client span (told to the model server)."""
    one = await bench(echo(), telemetry={"otlp_endpoint": collector.endpoint, "log_format": "json"})
    await ask(one.edge.port, "POST", CHAT, {"model": "gpt-small"}, traceparent=PARENT)
    client, server = sorted(await spans(collector, 2), key=lambda span: span.name != "chat small")
    assert (server.name, client.name) == (f"POST {CHAT}", "chat small")
    assert server.trace_id == client.trace_id == PARENT[3:35]
    assert (server.parent_id, client.parent_id) == (PARENT[36:52], server.span_id)
    assert one.admission.acquired[0].trace_parent == f"00-{server.trace_id}-{server.span_id}-01"
    assert one.server.seen[0].header(b"traceparent") == f"00-{client.trace_id}-{client.span_id}-01".encode()
    assert client.attributes["gen_ai.request.model"] == "small"
    assert client.attributes["gen_ai.usage.output_tokens"] == 4
    assert (await one.edge.access())[0]["trace_id"] == PARENT[3:35]


async def test_spans_end_when_the_client_leaves(bench: Make, collector: Collector) -> None:
    """A request that is cut ends its spans, marked with the reason."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.gone()

    one = await bench(script, telemetry={"otlp_endpoint": collector.endpoint, "log_format": "json"})
    client = await one.client()
    await client.send("POST", CHAT, b'{"model":"small"}', traceparent=PARENT)
    await until(lambda: one.server.seen, "the request arrived")
    client.leave()
    found = await spans(collector, 2)
    assert {span.attributes["error.type"] for span in found} == {"client_gone"}


async def test_without_tracing_the_callers_context_passes(bench: Make) -> None:
    """Tracing off: traceparent is one more end-to-end header, and admission is told it."""
    one = await bench(echo())
    await ask(one.edge.port, "POST", CHAT, {"model": "small"}, traceparent=PARENT, tracestate="a=b")
    assert one.server.seen[0].header(b"traceparent") == PARENT.encode()
    assert one.server.seen[0].header(b"tracestate") == b"a=b"
    assert one.admission.acquired[0].trace_parent == PARENT


@pytest.mark.parametrize(
    ("sample", "flags", "recorded"),
    [(0.0, "", False), (1.0, "", True), (0.0, "01", True), (1.0, "00", False)],
    ids=["by chance not", "by chance", "the caller's is", "the caller's isn't"],
)
async def test_a_trace_is_recorded_whole_or_not_at_all(
    bench: Make, collector: Collector, sample: float, flags: str, recorded: bool
) -> None:
    """Without a caller's word chance decides; ticket and model server are told, so that nobody behind us
    decides otherwise."""
    telemetry = {"otlp_endpoint": collector.endpoint, "sample": sample, "log_format": "json"}
    one = await bench(echo(), telemetry=telemetry)
    parents = {"traceparent": PARENT[:-2] + flags} if flags else {}
    await ask(one.edge.port, "POST", CHAT, {"model": "small"}, **parents)
    await ask(one.edge.port, "POST", CHAT, {"model": "small"}, traceparent=PARENT)
    found = await spans(collector, 4 if recorded else 2)
    ours = [span for span in found if span.parent_id != PARENT[36:52] and span.name.startswith("POST")]
    told = one.admission.acquired[0].trace_parent
    seen = (one.server.seen[0].header(b"traceparent") or b"").decode()
    assert [int(parent[-2:], 16) & 1 for parent in (told, seen)] == [recorded, recorded]
    assert told[3:35] == seen[3:35] != "0" * 32
    assert len(found) == (4 if recorded else 2)
    assert len(ours) == (recorded and not flags)
    if flags:
        assert told[3:35] == PARENT[3:35]
