"""The shell around the core: settings, metrics, the timer, the contract's numbers, the span of a wait."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import generate_latest

from tests.admission.support import READY, Desk, instance, model
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.lifecycle.v1 import lifecycle_pb2 as lpb
from tidegate_admission import metrics, settings, waits
from tidegate_admission.fairness import TenantRule, Tenants
from tidegate_admission.link import from_wire, to_wire
from tidegate_admission.supply import InstanceState
from tidegate_admission.ticket import Band, Outcome, Reason, Ticket
from tidegate_admission.timer import Timer
from tidegate_chassis import telemetry
from tidegate_chassis.config import ConfigError


def write(folder: Path, text: str) -> Path:
    """A configuration file."""
    path = folder / "tidegate.yaml"
    path.write_text(text)
    return path


def test_the_defaults_are_those_of_the_reference(tmp_path: Path) -> None:
    """An empty file gives the documented defaults; lifecycle is reached where it listens."""
    loaded = settings.load(write(tmp_path, "lifecycle: {listen: 'unix:/run/x/l.sock'}\n"))
    own = loaded.admission
    assert (own.listen, own.max_concurrent, own.max_queue) == ("127.0.0.1:7071", 50, 200)
    assert (own.queue_timeout, own.lease_ttl, own.aging, own.metrics_listen) == (300.0, 10.0, 60.0, "")
    assert loaded.lifecycle_address == "unix:/run/x/l.sock"
    assert settings.load(write(tmp_path, "")).lifecycle_address == "127.0.0.1:7072"
    explicit = settings.load(write(tmp_path, "admission: {lifecycle_address: 'host:1'}\n"))
    assert explicit.lifecycle_address == "host:1"


def test_tenants_have_their_own_weight_and_top_priority(tmp_path: Path) -> None:
    """A configured tenant has its own rule, every other name has the default's."""
    text = "admission: {aging: 30s}\ntenants: {default: {weight: 2}, team: {top_priority: high, "
    text += "requests_per_minute: 60, tokens_per_minute: 90000}}\n"
    loaded = settings.load(write(tmp_path, text))
    assert loaded.admission.aging == 30.0
    assert loaded.tenants.of("team") == TenantRule(1, Band.HIGH, 60, 90_000)
    assert loaded.tenants.of("") == loaded.tenants.of("made-up") == TenantRule(2, Band.NORMAL)
    assert loaded.effective()["tenants"]["team"] == {
        "weight": 1,
        "top_priority": "high",
        "requests_per_minute": 60,
        "tokens_per_minute": 90_000,
    }


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("admission: {max_concurrent: 0}", "admission.max_concurrent"),
        ("admission: {max_concurrent: 1001}", "admission.max_concurrent"),
        ("admission: {max_queue: -1}", "admission.max_queue"),
        ("admission: {max_queue: many}", "admission.max_queue"),
        ("admission: {lease_ttl: 301s}", "admission.lease_ttl"),
        ("admission: {lease_ttl: 10}", "admission.lease_ttl"),
        ("admission: {queue_timeout: 0}", "admission.queue_timeout"),
        ("admission: {aging: 0}", "admission.aging"),
        ("admission: {listen: nowhere}", "admission.listen"),
        ("admission: {no_such_key: 1}", "admission.no_such_key"),
        ("tenants: {team: {weight: 0}}", "tenants.team.weight"),
        ("tenants: {team: {top_priority: urgent}}", "tenants.team.top_priority"),
        ("tenants: {'my team': {weight: 2}}", "tenants.my team"),
        ("tenants: {default: {requests_per_minute: -1}}", "tenants.default.requests_per_minute"),
        ("tenants: {team: {tokens_per_minute: 1.5}}", "tenants.team.tokens_per_minute"),
    ],
)
def test_bad_values_and_keys_without_function_are_refused(tmp_path: Path, text: str, path: str) -> None:
    """Each problem is named by its path."""
    with pytest.raises(ConfigError) as refused:
        settings.load(write(tmp_path, text))
    assert [problem.path for problem in refused.value.problems] == [path]


def test_odd_but_legal_values_are_warned_about(tmp_path: Path) -> None:
    """More slots than places in the queue is legal and said; the default tenant with defaults is fine."""
    text = "admission: {max_concurrent: 50, max_queue: 10}\ntenants: {default: {weight: 1}}\n"
    (problem,) = settings.problems(write(tmp_path, text))
    assert problem.warning
    assert problem.path == "admission.max_concurrent"


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (Reason, pb.Reason, "REASON_"),
        (Outcome, pb.Outcome, "OUTCOME_"),
        (Band, pb.Band, "BAND_"),
        (InstanceState, lpb.InstanceState, "INSTANCE_STATE_"),
    ],
)
def test_the_numbers_are_those_of_the_contract(ours: type, theirs: object, prefix: str) -> None:
    """Names and numbers of the core's enums are the proto's, but for its UNSPECIFIED."""
    wire = {name.removeprefix(prefix): number for name, number in theirs.items()}  # type: ignore[attr-defined]
    del wire["UNSPECIFIED"]
    assert {item.name: int(item) for item in ours} == wire  # type: ignore[attr-defined]


def test_supply_and_demand_cross_the_wire_whole() -> None:
    """A report of lifecycle is understood, an older instance than this process is known as such."""
    one = lpb.InstanceSupply(
        instance_id="i", address="http://x", state=lpb.INSTANCE_STATE_READY, slots=4, running=3, queued=0
    )
    old = lpb.InstanceSupply(instance_id="o", state=lpb.INSTANCE_STATE_STARTING, age_ms=60_000)
    item = lpb.ModelSupply(
        model="m",
        max_queue=7,
        ready_in_ms=1500,
        reason=lpb.REASON_NEVER_FITS,
        message="why",
        instances=[one, old],
    )
    report = lpb.SupplyReport(
        generation=lpb.Generation(incarnation=3, n=9),
        whole=True,
        models=[item],
        roster=["s"],
        roster_known=True,
    )
    supply = from_wire(report, 30.0)
    (found,) = supply.models
    assert (supply.generation, supply.roster, supply.roster_known, supply.settled) == (
        (3, 9),
        ("s",),
        True,
        False,
    )
    assert (found.max_concurrent, found.max_queue, found.ready_in) == (None, 7, 1.5)
    assert (found.reason, found.message) == (Reason.NO_CAPACITY, "why")
    assert [(i.id, i.state, i.slots, i.old) for i in found.instances] == [
        ("i", READY, 4, False),
        ("o", InstanceState.STARTING, 0, True),
    ]
    assert [(i.running, i.queued) for i in found.instances] == [(3, 0), (None, None)]
    desk = Desk()
    desk.supply(model(instance(slots=1)), n=5)
    session, _ = desk.open()
    desk.acquire(session, 1, 2, trace_parent="00-1-2-01")
    desk.wait(3.0)
    demand = to_wire(desk.dispatcher.demand(True, desk.now), 77)
    assert (demand.admission_incarnation, demand.whole, demand.settled) == (77, True, True)
    assert (demand.supply_seen.n, list(demand.roster)) == (5, ["s"])
    (wanted,) = demand.models
    assert (wanted.waiting, wanted.oldest_wait_ms, wanted.trace_parent) == (1, 3000, "00-1-2-01")
    assert (wanted.instances[0].leases, wanted.instances[0].grants) == (1, 1)


async def test_metrics_are_the_sets_and_conservation_is_zero() -> None:
    """A scrape from another thread reads the loop's state; the conservation gauge stays 0."""
    desk = Desk(tenants=Tenants(named={"team": TenantRule(requests=60)}))
    desk.supply(model(instance(slots=1)))
    session, _ = desk.open()
    desk.acquire(session, 1, 2)
    desk.acquire(session, 3, model="made-up")
    desk.done(session, 1, 99)
    desk.done(session, 2, outcome=Outcome.BACKPRESSURE)
    desk.acquire(session, 4)
    loop = asyncio.get_running_loop()
    collector = metrics.AdmissionCollector(desk.dispatcher, metrics.Gaps(), loop, lambda: desk.now)
    text = (await asyncio.to_thread(generate_latest, metrics.registry(collector))).decode()
    lines = set(text.splitlines())
    assert {
        "tidegate_admission_conservation_error 0.0",
        "tidegate_admission_unknown_ids_total 1.0",
        'tidegate_admission_active_leases{model="m"} 1.0',
        'tidegate_admission_queue_depth{model="m"} 0.0',
        'tidegate_admission_grants_total{model="m"} 3.0',
        'tidegate_admission_lease_ends_total{end="released",model="m"} 2.0',
        'tidegate_admission_effective_slots{model="m"} 1.0',
        'tidegate_admission_slot_halvings_total{model="m"} 1.0',
        'tidegate_admission_refusals_total{model="(unknown)",reason="model_not_found"} 1.0',
        'tidegate_admission_wait_seconds_count{model="m"} 3.0',
        'tidegate_admission_sessions{state="connected"} 1.0',
        'tidegate_admission_rate_limit{kind="requests",tenant="team"} 60.0',
        'tidegate_admission_rate_remaining{kind="requests",tenant="team"} 1.0',
    } <= lines
    assert "made-up" not in text


def test_a_late_tick_expires_nothing_and_a_long_gap_shifts() -> None:
    """After a stall the timer lets input be read first; after a long one all expiries come later."""
    desk = Desk()
    desk.supply(model(instance()))
    session, _ = desk.open()
    desk.acquire(session, 1)
    gaps = metrics.Gaps()
    timer = Timer(desk.dispatcher, gaps, lambda: desk.now)
    timer.look(desk.now)
    for _ in range(196):
        desk.now += 0.05
        timer.look(desk.now)
    desk.now += 1.0  # past the ttl, less than a quarter of it
    timer.look(desk.now)
    assert session.leases, "what came meanwhile had not been read"
    assert gaps.count == 0
    desk.beat(session, 1, (1,))
    desk.now += 60.0
    timer.look(desk.now)
    desk.now += 0.05
    timer.look(desk.now)
    assert session.leases
    assert (gaps.count, round(gaps.longest)) == (1, 60)
    for _ in range(201):
        desk.now += 0.05
        timer.look(desk.now)
    assert not session.leases


def test_a_busy_loop_still_expires() -> None:
    """Ticks that are all late skip every second one, not all."""
    desk = Desk()
    session, _ = desk.open()
    desk.supply(model(instance()))
    desk.acquire(session, 1)
    timer = Timer(desk.dispatcher, metrics.Gaps(), lambda: desk.now)
    for _ in range(40):
        desk.now += 0.4
        timer.look(desk.now)
    assert not session.leases


def test_a_wait_becomes_a_span_with_its_true_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made at the end of the wait, under the caller's span; a refusal marks it as failed with its reason."""
    from opentelemetry.sdk.trace import TracerProvider

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    desk = Desk(queue_timeout=5.0)
    desk.dispatcher.books.on_wait_end = waits.report
    desk.supply(model(instance(slots=1)))
    session, _ = desk.open()
    parent = f"00-{7:032x}-{9:016x}-01"
    desk.acquire(session, 1, 2, 3, trace_parent=parent)
    desk.wait(2.0)
    desk.done(session, 1)
    desk.beat(session, 1, (2,))
    desk.wait(3.5)
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["admission.wait"] * 3
    seconds = [round((span.end_time or 0) / 1e9 - (span.start_time or 0) / 1e9, 3) for span in spans]
    assert seconds == [0.0, 2.0, 5.5]
    attributes = [dict(span.attributes or {}) for span in spans]
    assert [a["tidegate.outcome"] for a in attributes] == ["granted", "granted", "queue_timeout"]
    assert [a["tidegate.queue_position"] for a in attributes] == [1, 2, 3]
    assert attributes[1]["tidegate.model"] == "m"
    assert {span.context.trace_id for span in spans if span.context} == {7}
    assert spans[2].status.status_code is StatusCode.ERROR
    assert attributes[2]["error.type"] == "QUEUE_TIMEOUT"
    assert Ticket(("s", 1), "m", 0.0).trace_parent == ""
