"""Logs, traces and the metrics port, set up once per process. What fails here never fails a request."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from random import getrandbits, random
from typing import Any, Literal

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from prometheus_client import CollectorRegistry, start_http_server

from tidegate_chassis import logs
from tidegate_chassis.config import TelemetrySettings

_KINDS = {
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "internal": SpanKind.INTERNAL,
    "consumer": SpanKind.CONSUMER,
}
_provider: TracerProvider | None = None
_sample = 0.0
"""Share of the traces begun here that are recorded."""
_tracer: trace.Tracer = trace.NoOpTracer()


def set_up(service: str, settings: TelemetrySettings, worker: int = 0) -> None:
    """Starts logging and, when an endpoint is set, tracing. Call it once, after any fork.

    `worker`: the number of one of several processes of the service; 0 = the only one."""
    logs.set_up(service, settings, worker)
    global _provider, _sample, _tracer
    if not settings.otlp_endpoint:
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    logging.getLogger("opentelemetry").setLevel(
        logging.CRITICAL
    )  # a dead collector is no news, again and again
    exporter = OTLPSpanExporter(
        endpoint=settings.otlp_endpoint, insecure=not settings.otlp_endpoint.startswith("https"), timeout=3
    )
    _sample = settings.sample
    _provider = TracerProvider(
        sampler=ParentBased(ALWAYS_ON),  # what isn't to be recorded never comes to it
        resource=Resource.create(
            {"service.name": f"tidegate-{service}", "service.instance.id": _instance(worker)}
        ),
        shutdown_on_exit=False,
    )
    _provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    _tracer = _provider.get_tracer("tidegate")


def _instance(worker: int) -> str:
    """This process among all that tell of themselves: host, pid and, of several, the worker's number."""
    return f"{socket.gethostname()}:{os.getpid()}" + (f":{worker}" if worker else "")


def shut_down() -> None:
    """Sends what is left, for at most 3 s. Blocks: call it after the loop has ended."""
    if _provider is not None:
        flusher = threading.Thread(target=_provider.shutdown, daemon=True)
        flusher.start()
        flusher.join(3)
    logs.flush(1.0)


def traced() -> bool:
    """Whether spans go anywhere at all."""
    return _provider is not None


def dropped(parent: str) -> bool:
    """Whether a traceparent says plainly that its trace isn't recorded: saves making a span's attributes."""
    return parent.endswith("-00")


def start_span(
    name: str,
    parent: str = "",
    kind: Literal["server", "client", "internal", "consumer"] = "internal",
    start_ns: int | None = None,
    attributes: dict[str, Any] | None = None,
) -> Span:
    """A span that the caller ends. `parent` is a W3C traceparent; empty = a new trace.

    `start_ns` (wall clock, nanoseconds) makes a span at its end, for waits that would hold it in memory.
    Whether it is recorded is as its parent says, else by chance: decided here, because for one that isn't the
    SDK would cost more than all that is said of it.
    """
    above = _parse(parent)
    if not above.trace_flags.sampled and (above.is_valid or random() >= _sample):  # noqa: S311 - no secret
        return trace.NonRecordingSpan(above if above.is_valid or _provider is None else _unsampled())
    context = trace.set_span_in_context(trace.NonRecordingSpan(above))
    return _tracer.start_span(name, context, _KINDS[kind], attributes or {}, start_time=start_ns)


@contextlib.contextmanager
def span(
    name: str, parent: str = "", kind: Literal["server", "client", "internal"] = "internal"
) -> Iterator[Span]:
    """A span around a block; an exception marks it as failed, by its type alone."""
    current = start_span(name, parent, kind)
    try:
        yield current
    except BaseException as error:
        fail_span(current, type(error).__name__)
        raise
    finally:
        current.end()


def fail_span(current: Span, reason: str) -> None:
    """Marks a span as failed for a reason (an enum's name or an exception's type, never a text of users)."""
    current.set_status(Status(StatusCode.ERROR, reason))
    current.set_attribute("error.type", reason)


def traceparent(current: Span) -> str:
    """The W3C traceparent of a span; "" when it isn't part of a trace."""
    context = current.get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _unsampled() -> SpanContext:
    """A new trace that nobody records, those behind us included."""
    return SpanContext(getrandbits(128) or 1, getrandbits(64) or 1, is_remote=False)


def _parse(text: str) -> SpanContext:
    """A traceparent's context; an invalid one (which starts a new trace) when it is malformed."""
    if not text:
        return trace.INVALID_SPAN_CONTEXT
    parts = text.split("-")
    try:
        if len(parts) < 4 or [len(part) for part in parts[:4]] != [2, 32, 16, 2]:
            return trace.INVALID_SPAN_CONTEXT
        flags = TraceFlags(int(parts[3], 16))
        return SpanContext(int(parts[1], 16), int(parts[2], 16), is_remote=True, trace_flags=flags)
    except ValueError:
        return trace.INVALID_SPAN_CONTEXT


def serve_metrics(listen: str, registry: CollectorRegistry) -> None:
    """Serves /metrics on `host:port` from a thread of its own; nothing when `listen` is empty."""
    if listen:
        host, _, port = listen.rpartition(":")
        start_http_server(int(port), host.strip("[]"), registry)
