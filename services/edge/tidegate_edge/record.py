"""What is written down about a request: spans, metrics, and one line in the access log."""

from __future__ import annotations

from time import monotonic

import structlog
from opentelemetry.trace import Span

from tidegate_chassis import telemetry
from tidegate_edge import semconv
from tidegate_edge.head import Head
from tidegate_edge.metrics import Metrics
from tidegate_edge.ticket import Grant
from tidegate_edge.usage import NONE, UNKNOWN, Tail, Tokens, free, paid

log = structlog.get_logger("tidegate.edge.access")


class Record:
    """One request's record. Cheap when tracing is off."""

    __slots__ = (
        "_call", "_first", "_head", "_metrics", "_passed_on", "_path", "_retries", "_server", "_started",
        "_status", "_tokens", "asked", "events", "instance", "loading", "method", "model", "outcome",
        "queued", "trace_parent",
    )  # fmt: skip

    def __init__(self, metrics: Metrics, method: str, path: bytes, head: Head) -> None:
        self._metrics = metrics
        self._path = path
        self._head = head
        self._started = monotonic()
        self._first = 0.0
        self._retries = 0
        self._server: Span | None = None
        self._call: Span | None = None
        self._status = 0
        self._tokens: Tokens | None = None
        self.asked = 0
        """Tokens of the prompt, by the size of the body; 0 = it is no text."""
        self.method = method
        self.model = ""
        """A name of the catalogue; empty = it was not found out."""
        self.instance = ""
        self.queued = 0.0
        """Seconds spent waiting for grants."""
        self.loading = 0.0
        """Seconds of these in which the model was loading."""
        self.events = False
        """The answer is an SSE stream."""
        self.outcome = "ok"
        """ok, upstream_status, a code of the error table, client_gone, client_stuck or cancelled."""
        self.trace_parent = head.trace_parent.decode("latin-1")
        """W3C traceparent that goes into the ticket; empty = not traced."""
        self._passed_on = ""
        if telemetry.traced():
            server = telemetry.start_span(
                f"{method} {path.decode('latin-1')}", parent=self.trace_parent, kind="server"
            )
            self._passed_on = self.trace_parent = telemetry.traceparent(server)
            if server.is_recording():
                self._server = server
                server.set_attribute(semconv.REQUEST_METHOD, method)
                server.set_attribute(semconv.ROUTE, path.decode("latin-1"))
                server.set_attribute(semconv.REQUEST_ID, head.request_id.decode())

    def attempt(self, grant: Grant) -> str:
        """The request goes to an instance; the traceparent for it, empty = the caller's own."""
        if self._server is None:
            return self._passed_on
        operation = semconv.operation(self._path)
        self._call = telemetry.start_span(
            f"{operation} {self.model}",
            parent=self.trace_parent,
            kind="client",
            attributes={
                semconv.OPERATION: operation,
                semconv.PROVIDER: "tidegate",
                semconv.REQUEST_MODEL: self.model,
                semconv.SERVER_ADDRESS: grant.address,
                semconv.INSTANCE: grant.instance_id,
            },
        )
        return telemetry.traceparent(self._call)

    def attempt_failed(self, reason: str) -> None:
        """No answer came of it."""
        if self._call is not None:
            telemetry.fail_span(self._call, reason)
            self._call.end()
            self._call = None

    def retried(self) -> None:
        """Another attempt follows."""
        self._retries += 1
        self.instance = ""
        self._metrics.retried(self.model)()

    def answered(self, status: int, reused: bool) -> None:
        """The head of a response has come."""
        self._status = status
        self._first = monotonic() - self._started
        self._metrics.upstream(reused)()
        self._metrics.first_byte(self.model)(self._first)
        if status >= 400:
            self.outcome = "upstream_status"
        if self._call is not None:
            self._call.set_attribute(semconv.STATUS_CODE, status)

    def fail(self, code: str) -> None:
        """The edge answers with an error of its own."""
        self.outcome = code
        self._metrics.refused(code)()

    def tokens(self, tail: Tail) -> Tokens:
        """Tokens of the response as far as it has come; looked for once. An error costs none, if it doesn't
        tell any."""
        if self._tokens is None:
            found = tail.tokens(self.events, self.asked) if tail.size else UNKNOWN
            nothing = self._status >= 400 or free(self._path)
            if paid(self._path) or (nothing and not (found.prompt or found.completion)):
                found = NONE
            self._tokens = found
        return self._tokens

    def close(self, status: int, tail: Tail) -> None:
        """The request has ended: everything that counts and tells it."""
        total = monotonic() - self._started
        status = status or 499
        prompt, completion, estimated, _ = self.tokens(tail)
        metrics, model = self._metrics, self.model
        metrics.requests(model, str(status), self.outcome)()
        metrics.duration(model)(total)
        if model:
            metrics.queue_wait(model)(self.queued)
        if prompt:
            metrics.tokens(model, "prompt")(prompt)
        if completion:
            metrics.tokens(model, "completion")(completion)
        self._end_spans(status, prompt, completion)
        log.info(
            "request",
            request_id=self._head.request_id.decode(),
            trace_id=self.trace_parent[3:35],
            route=f"{self.method} {self._path.decode('latin-1')}",
            key=self._head.caller.key,
            model=model,
            instance=self.instance,
            status=status,
            outcome=self.outcome,
            retries=self._retries,
            queue_ms=round(self.queued * 1000, 1),
            load_ms=round(self.loading * 1000, 1),
            first_byte_ms=round(self._first * 1000, 1),
            total_ms=round(total * 1000, 1),
            prompt_tokens=prompt,
            completion_tokens=completion,
            estimated=estimated,
        )

    def _end_spans(self, status: int, prompt: int, completion: int) -> None:
        failed = "" if self.outcome in ("ok", "upstream_status") else self.outcome
        if self._call is not None:
            self._call.set_attribute(semconv.INPUT_TOKENS, prompt)
            self._call.set_attribute(semconv.OUTPUT_TOKENS, completion)
            if failed:
                telemetry.fail_span(self._call, failed)
            self._call.end()
        if self._server is not None:
            self._server.set_attribute(semconv.STATUS_CODE, status)
            self._server.set_attribute(semconv.QUEUE_SECONDS, self.queued)
            if failed or status >= 500:
                telemetry.fail_span(self._server, failed or str(status))
            self._server.end()
