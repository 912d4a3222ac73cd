"""gRPC by TLS and mutual TLS: who gets in, what is said of who doesn't, and renewal without a restart."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
import structlog
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.certificates import Authority
from tests.support.until import until
from tidegate_chassis import rpc, watch
from tidegate_chassis.tls import TlsFiles

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(autouse=True)
def plain_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process speaks TLS in these tests alone; files are looked at often."""
    monkeypatch.setattr(watch, "PACE", 0.02)
    monkeypatch.setattr(rpc, "_PATIENCE", 0.3)
    yield
    rpc.secure(None)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    """Who signs the certificates of this installation."""
    made = Authority(tmp_path / "ours")
    made.issue()
    return made


@pytest.fixture
def others(tmp_path: Path) -> Authority:
    """Who signs somebody else's."""
    made = Authority(tmp_path / "others")
    made.issue()
    return made


def _files(authority: Authority, mutual: bool = True, trust: Authority | None = None) -> TlsFiles:
    paths = {key: Path(path) for key, path in authority.section().items()}
    return TlsFiles("tls", paths["cert"], paths["key"], (trust or authority).ca, mutual)


@contextlib.asynccontextmanager
async def _serving(files: TlsFiles | None, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """A server that watches its files; its address. What is called from here on uses them too."""
    await asyncio.to_thread(rpc.secure, files)
    server = rpc.Server(listen, "listen", [])
    address = await server.start()
    watching = asyncio.create_task(rpc.watch_certificates())
    try:
        yield address
        assert not watching.done()
    finally:
        watching.cancel()
        await server.stop(0)


async def _health(channel: aio.Channel) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status)


async def _refused(address: str, files: TlsFiles | None) -> str:
    """Why a client with these files doesn't reach a server, in operators' words."""
    await asyncio.to_thread(rpc.secure, files)
    with pytest.raises(aio.AioRpcError) as caught:
        async with rpc.channel(address) as channel:
            await _health(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return rpc.why_unavailable(caught.value)


async def test_only_who_is_signed_gets_in(ours: Authority, others: Authority, tmp_path: Path) -> None:
    """Mutual TLS: one's own get in; nobody without a certificate, with another authority's, or without TLS;
    nor does a client talk to a server that it can't trust. Each is told what is wrong."""
    async with _serving(_files(ours)) as address:
        async with rpc.channel(address) as channel:
            assert await _health(channel) == NOT_SERVING
        only_ca = TlsFiles("tls", None, None, ours.ca)
        assert "this side's tls.cert must be valid" in await _refused(address, only_ca)
        assert "this side's tls.cert must be valid" in await _refused(address, _files(others, trust=ours))
        assert "isn't signed by this side's tls.ca" in await _refused(address, _files(others))
        assert "if it speaks TLS, this side needs" in await _refused(address, None)
        name = address.replace("127.0.0.1", "localhost")
        assert "doesn't name the host" in await _refused(name, _files(ours))
    ours.issue(days=(-9, -1))
    async with _serving(_files(ours)) as address:
        assert "isn't valid now" in await _refused(address, only_ca)
    async with _serving(None) as address:
        assert "it doesn't speak TLS" in await _refused(address, only_ca)


async def test_without_mutual_tls_nobody_is_asked_for_a_certificate(ours: Authority, tmp_path: Path) -> None:
    """`require_client_cert: false`: `ca` is enough to call. Unix sockets are plain in any case."""
    async with _serving(_files(ours, mutual=False)) as address:
        await asyncio.to_thread(rpc.secure, TlsFiles("tls", None, None, ours.ca))
        async with rpc.channel(address) as channel:
            assert await _health(channel) == NOT_SERVING
    async with (
        _serving(_files(ours), f"unix:{tmp_path}/s") as address,
        aio.insecure_channel(address) as channel,
    ):
        assert await _health(channel) == NOT_SERVING


async def test_old_tls_is_refused(ours: Authority) -> None:
    """gRPC's server and ours agree on TLS 1.2 or later, and on HTTP/2."""
    async with _serving(_files(ours, mutual=False)) as address:
        context = ours.client()
        host, _, port = address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        secured = writer.get_extra_info("ssl_object")
        assert (secured.version(), secured.selected_alpn_protocol()) == ("TLSv1.3", "h2")
        writer.close()


async def test_a_renewed_certificate_is_used_by_both_sides(ours: Authority, others: Authority) -> None:
    """All files are replaced by another authority's, while a call goes on. It isn't disturbed; what is opened
    later uses the new ones, which only they allow: the old authority's clients are strangers now."""
    async with _serving(_files(ours)) as address, rpc.connected(address) as long:
        watch = health_pb2_grpc.HealthStub(long).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        before = grpc.ssl_channel_credentials(
            ours.trust, (ours.folder / "own.key").read_bytes(), (ours.folder / "own.pem").read_bytes()
        )
        for name in ("own.key", "own.pem", "ca.pem"):
            (others.folder / name).replace(ours.folder / name)

        async def strange() -> bool:
            async with aio.secure_channel(address, before) as channel:
                try:
                    return not await _health(channel)
                except aio.AioRpcError as error:
                    return "CERTIFICATE_VERIFY_FAILED" in str(error.details())

        await until(strange, "the server has another certificate")
        async with rpc.connected(address) as channel:
            assert await _health(channel) == NOT_SERVING
        assert not watch.done()
        watch.cancel()


async def test_who_waits_for_a_connection_takes_renewed_files(ours: Authority, others: Authority) -> None:
    """A client that isn't let in says why, once, and gets in when its files have been replaced."""
    async with _serving(_files(ours)) as address:
        await asyncio.to_thread(rpc.secure, _files(others))
        watching = asyncio.create_task(rpc.watch_certificates())
        with structlog.testing.capture_logs() as logs:

            async def waiting() -> int:
                async with rpc.connected(address) as channel:
                    return await _health(channel)

            task = asyncio.create_task(waiting())
            await until(lambda: logs, "the reason")
            for name in ("own.key", "own.pem", "ca.pem"):
                (ours.folder / name).replace(others.folder / name)
            assert await asyncio.wait_for(task, 15) == NOT_SERVING
        watching.cancel()
        away = [entry for entry in logs if entry["event"] == "a service can't be reached"]
        assert [
            (entry["address"], "isn't signed by this side's tls.ca" in entry["why"]) for entry in away
        ] == [(address, True)]
