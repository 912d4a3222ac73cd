"""gRPC as every service uses it: addresses, TLS, options, health, reflection, errors and trace context."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from tidegate_chassis import telemetry
from tidegate_chassis.config import ConfigError, Problem
from tidegate_chassis.errors import Refused
from tidegate_chassis.tls import Certificates, Credentials, TlsFiles

DOMAIN = "tidegate"
log = structlog.get_logger("tidegate.rpc")

_PATIENCE = 3.0
"""Seconds without a connection after which the reason is looked for, and TLS files as they are then tried."""
_MESSAGE = 4 * 2**20
"""Largest message that is taken, in bytes; a larger one ends its call with RESOURCE_EXHAUSTED."""
_COMMON = [
    ("grpc.max_receive_message_length", _MESSAGE),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]
# Defaults took 10.7 s to reconnect after an outage of 15 s; these take less than a second.
_CHANNEL = [
    *_COMMON,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    # Else channels to one address share a connection, and a new channel gets one that has gone silent.
    ("grpc.use_local_subchannel_pool", 1),
]
_SERVER = [
    *_COMMON,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    (
        "grpc.so_reuseport",
        0,
    ),  # a second service on the same port is an error, not a silent half of the traffic
]
# Of the last setting of a name the value counts.
_UNIX_CHANNEL = [*_CHANNEL, ("grpc.default_authority", "tidegate")]
# How long an attempt to connect may take, which are three journeys there and back with TLS.
_TLS_CHANNEL = [*_CHANNEL, ("grpc.min_reconnect_backoff_ms", 3_000)]

_certificates: Certificates | None = None


def secure(files: TlsFiles | None) -> None:
    """From now on this process speaks TLS on every address but Unix sockets; None = it doesn't. It reads the
    files, and blocks: before there is an event loop. ConfigError when they can't be used.
    """
    global _certificates
    _certificates = Certificates(files) if files is not None else None


async def watch_certificates() -> None:
    """Takes in changed TLS files until cancelled: connections made later use them."""
    if _certificates is None:
        await asyncio.Event().wait()
    else:
        log.info("gRPC is encrypted", mutual=_certificates.files.mutual)
        await _certificates.watch()


def channel(address: str) -> aio.Channel:
    """A channel to `host:port` or `unix:/path`: connects when first used, reconnects within a second.

    It keeps the TLS files of now, as gRPC can't give it others later: for a long life take `connected`.
    """
    if address.startswith("unix:"):
        return aio.insecure_channel(address, options=_UNIX_CHANNEL)
    if _certificates is None:
        return aio.insecure_channel(address, options=_CHANNEL)
    return aio.secure_channel(address, _for_channel(_certificates.current), options=_TLS_CHANNEL)


class Peer:
    """A service that is asked now and then. Each call has a connection of its own, made with the TLS files of
    then, which costs a millisecond and a half; whoever stops waiting for it cancels it."""

    def __init__(self, address: str, stub: Callable[[aio.Channel], Any]) -> None:
        """`stub` is the generated class."""
        self._address, self._stub = address, stub

    async def ask(self, method: str, request: Any, timeout: float) -> Any:
        """One unary call; AioRpcError when it fails or isn't answered within `timeout` seconds."""
        async with channel(self._address) as one:
            return await getattr(self._stub(one), method)(request, timeout=timeout)


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[aio.Channel]:
    """A channel for one long call, once it has a connection, however long that takes. Why it takes long is
    logged, each reason once. When the call has ended, the next one needs a channel of its own: each is made
    with the TLS files as they are then.
    """
    said = ""
    while True:
        async with channel(address) as one:
            try:
                async with asyncio.timeout(_PATIENCE):
                    await one.channel_ready()
            except TimeoutError:
                why = await _why_away(one)
            else:
                yield one
                return
        if why not in ("", said):
            log.warning("a service can't be reached", address=address, why=why)
            said = why


async def _why_away(one: aio.Channel) -> str:
    """What a call hears that doesn't wait for a connection; "" when there is one by now."""
    try:
        await health_pb2_grpc.HealthStub(one).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
    except aio.AioRpcError as error:
        return why_unavailable(error)
    return ""


def why_unavailable(error: aio.AioRpcError) -> str:
    """Why no connection was made, in words for operators; gRPC's own unless it is about TLS."""
    details = (error.details() or "").rpartition("last error: ")[2]
    for mark, words in _PLAIN_FAILURES if _certificates is None else _TLS_FAILURES:
        if mark in details:
            return f"{words}; gRPC says: {details}"
    return details


_PLAIN_FAILURES = (("Socket closed", "it hung up: if it speaks TLS, this side needs the section tls too"),)
_TLS_FAILURES = (
    ("CERTIFICATE_VERIFY_FAILED", "its certificate isn't signed by this side's tls.ca, or isn't valid now"),
    ("Hostname Verification", "its certificate doesn't name the host of this address"),
    ("WRONG_VERSION_NUMBER", "it doesn't speak TLS: it needs the section tls too"),
    ("Socket closed", "it hung up: this side's tls.cert must be valid, and signed by its tls.ca"),
)


def _for_channel(credentials: Credentials) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(credentials.ca, credentials.key or None, credentials.cert or None)


def _for_server(certificates: Certificates) -> grpc.ServerCredentials:
    """gRPC asks for what is new before each handshake, in a thread of its own."""
    told = certificates.current

    def news() -> grpc.ServerCertificateConfiguration | None:
        nonlocal told
        if told is certificates.current:
            return None
        told = certificates.current
        return _configuration(told)

    first, mutual = _configuration(told), certificates.files.mutual
    return grpc.dynamic_ssl_server_credentials(first, news, mutual)  # type: ignore[arg-type]  # None: no news


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    pair = (credentials.key, credentials.cert)
    return grpc.ssl_server_certificate_configuration([pair], credentials.ca)


def reconnect_delays() -> Iterator[float]:
    """Seconds to wait before each attempt to open a stream again: 0.1 doubling to 1, with jitter."""
    delay = 0.1
    while True:
        yield delay * random.uniform(0.7, 1.3)  # noqa: S311 - spreads reconnects, guards nothing
        delay = min(1.0, delay * 2)


class Server:
    """A gRPC server with health (NOT_SERVING until told), reflection, deadlines and a graceful stop."""

    def __init__(self, listen: str, setting: str, services: list[str]) -> None:
        """`setting` is the configuration's name of `listen`, for errors; `services` are full proto names."""
        self.listen, self._setting, self._services = listen, setting, services
        self.server = aio.server(interceptors=[_Border()], options=_SERVER)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self.server)

    async def start(self) -> str:
        """Binds and starts; returns the address (port 0 is filled in). ConfigError when it is taken."""
        await self.set_serving(False)
        taken = await asyncio.to_thread(_why_taken, self.listen)
        if taken:
            raise ConfigError([Problem(self._setting, taken)])
        try:
            with _private_umask():
                port = self._bind()
                await self.server.start()
        except RuntimeError as error:
            raise ConfigError([Problem(self._setting, f"can't listen on {self.listen}: {error}")]) from None
        if not self.listen.startswith("unix:"):
            self.listen = f"{self.listen.rpartition(':')[0]}:{port}"
        return self.listen

    def _bind(self) -> int:
        if _certificates is None or self.listen.startswith("unix:"):
            return self.server.add_insecure_port(self.listen)
        return self.server.add_secure_port(self.listen, _for_server(_certificates))

    async def set_serving(self, serving: bool) -> None:
        """What health checks are told, for the server as a whole ("") and each service."""
        state = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ["", *self._services]:
            await self._health.set(name, state)

    async def stop(self, grace: float) -> None:
        """Takes no new calls, gives running ones `grace` seconds, then ends them."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace)
        if self.listen.startswith("unix:"):
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(os.unlink, self.listen.removeprefix("unix:"))


def _why_taken(listen: str) -> str:
    """What is wrong with an address before it is bound; "" when it is free. A dead socket file is removed."""
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(path)
            except FileNotFoundError:
                return "" if os.path.isdir(os.path.dirname(path)) else f"the folder of {path} does not exist"
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                return ""
        return f"{path} is in use by another process; `ss -lxp` shows which"
    host, _, port = listen.rpartition(":")
    if port == "0":
        return ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            return f"can't listen on {listen} ({error.strerror}); `ss -ltnp` shows who does"
    return ""


@contextlib.contextmanager
def _private_umask() -> Any:
    before = os.umask(0o177)  # a Unix socket is made with mode 0600
    try:
        yield
    finally:
        os.umask(before)


class _Border(aio.ServerInterceptor):
    """Turns `Refused` into a google.rpc.Status, anything else into INTERNAL (logged, no text of it on the
    wire), and gives unary calls a span."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc."):
            return handler
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _stream(handler.stream_stream), handler.request_deserializer, handler.response_serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary(handler.unary_unary, details.method),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _unary(method: Callable[[Any, Any], Awaitable[Any]], name: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        metadata = dict(context.invocation_metadata() or ())
        with telemetry.span(name.lstrip("/"), parent=str(metadata.get("traceparent", "")), kind="server"):
            async with _translated(context, name):
                return await method(request, context)

    return call


def _stream(method: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        async with _translated(context, "stream"), contextlib.aclosing(method(request, context)) as messages:  # type: ignore[type-var]
            async for message in messages:
                yield message

    return call


@contextlib.asynccontextmanager
async def _translated(context: aio.ServicerContext[Any, Any], name: str) -> AsyncIterator[None]:
    try:
        yield
    except Refused as error:
        await context.abort_with_status(rpc_status.to_status(to_status(error)))
    except (aio.AbortError, grpc.RpcError, GeneratorExit):
        raise
    except Exception:
        log.exception("a call failed", method=name)
        await context.abort(grpc.StatusCode.INTERNAL, "an internal error; the service's log tells more")


def to_status(error: Refused) -> status_pb2.Status:
    """The wire's form: ErrorInfo with the reason, RetryInfo when a retry may help."""
    details = [_packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))]
    if error.retry_after > 0:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after * 1000))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    code = code_pb2.Code.Value(error.code.name)
    return status_pb2.Status(code=code, message=error.message, details=details)


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def reason_of(error: grpc.RpcError) -> str:
    """The ErrorInfo.reason of a failed call; "" when it carries none (the connection broke, say)."""
    return str(_detail(error, error_details_pb2.ErrorInfo()).reason)


def retry_of(error: grpc.RpcError) -> float:
    """The RetryInfo of a failed call, in seconds; 0 when it carries none."""
    delay = _detail(error, error_details_pb2.RetryInfo()).retry_delay
    return float(delay.ToMilliseconds()) / 1000


def _detail(error: grpc.RpcError, info: Any) -> Any:
    """`info`, filled with the detail of its kind if the error has one."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            break
    return info


def describe(error: grpc.RpcError) -> str:
    """A failed call in a few words, for logs: status and reason, no text of the peer."""
    code = error.code().name if isinstance(error, aio.AioRpcError) else type(error).__name__
    return f"{code} {reason_of(error)}".strip()
