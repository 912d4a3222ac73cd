"""One request is one trace, through all services and on to the model server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.support.collector import Collector, Received
from tests.support.gateway import Gateway, simulated, wait_for

Make = Callable[..., Gateway]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


def test_one_trace_per_request_through_all_services(gateway: Make, collector: Collector) -> None:
    """A cold request's trace holds the edge's, admission's and lifecycle's spans, and reaches the server."""
    telemetry = {"otlp_endpoint": collector.endpoint, "sample": 1.0}
    one = gateway({"a": simulated("--load-time", "0.3")}, telemetry=telemetry).start()
    parent = f"00-{TRACE}-00f067aa0ba902b7-01"
    answer = one.http.post(
        "/v1/chat/completions",
        json={"model": "a", "messages": [{"role": "user", "content": "a secret prompt"}]},
        headers={"traceparent": parent},
    )
    assert answer.status_code == 200

    def received() -> dict[str, Received]:
        return {span.name: span for span in collector.spans() if span.trace_id == TRACE}

    wait_for(lambda: len(received()) >= 4, "four spans have arrived")
    spans = received()
    server = spans["POST /v1/chat/completions"]
    assert (server.service, server.parent_id) == ("tidegate-edge", "00f067aa0ba902b7")
    waited, loaded = spans["admission.wait"], spans["lifecycle.load"]
    assert (waited.service, waited.parent_id) == ("tidegate-admission", server.span_id)
    assert loaded.service == "tidegate-lifecycle"
    assert 0.2e9 < loaded.end - loaded.start <= (waited.end - waited.start) + 0.5e9
    (upstream,) = (span for span in spans.values() if span.service == "tidegate-edge" and span is not server)
    assert upstream.parent_id == server.span_id
    (instance,) = one.instances()
    seen = httpx.get(f"{instance['address']}/simulator/requests", trust_env=False).json()["requests"]
    (request,) = (entry for entry in seen if entry["path"] == "/v1/chat/completions")
    sent = {name.lower(): value for name, value in request["headers"]}
    assert sent["traceparent"] == f"00-{TRACE}-{upstream.span_id}-01"
    assert "secret prompt" not in str(collector.spans()) + one.log()


def test_a_dead_collector_changes_nothing(gateway: Make, collector: Collector) -> None:
    """Requests are served and everything stops in time when traces can't be sent."""
    collector.close()
    one = gateway({"a": simulated()}, telemetry={"otlp_endpoint": collector.endpoint, "sample": 1.0}).start()
    assert one.chat("a").status_code == 200
    assert one.chat("a").elapsed.total_seconds() < 1
    assert one.stop(within=10) == 0
