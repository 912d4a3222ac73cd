"""The services over TLS: strangers stay out, everything is renewed under traffic, and clients use HTTPS."""

from __future__ import annotations

import json
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import yaml

from tests.support.apart import Apart
from tests.support.certificates import Authority, put
from tests.support.crowd import Ask, Crowd
from tests.support.gateway import BIN, Gateway, simulated, wait_for
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc

CHANGED = "changed TLS files are in use"


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    """Signs everybody's certificates here."""
    made = Authority(tmp_path / "ours")
    for name in ("services", "edge"):
        made.issue(name)
    return made


@pytest.fixture
def others(tmp_path: Path) -> Authority:
    """Signs somebody else's."""
    made = Authority(tmp_path / "others")
    made.issue("edge")
    return made


@pytest.fixture
def one(tmp_path: Path, ours: Authority, others: Authority) -> Iterator[Apart]:
    """Two edges, of which the second one has certificates of another authority; all are started."""
    edges = [ours.section("edge"), others.section("edge")]
    models = {"a": simulated(max_concurrent=4)}
    made = Apart(tmp_path, models, edges=2, edge_tls=edges, tls=dict(ours.section("services")))
    made.start("lifecycle", "admission", "edge0", "edge1")
    yield made
    made.close()


def _shown(address: str) -> str:
    """The certificate that a service shows."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return ssl.get_server_certificate((host, int(port)))


def _asked(one: Apart, credentials: grpc.ChannelCredentials | None) -> str:
    """What becomes of a call to admission."""
    at = one.books_address
    with grpc.secure_channel(at, credentials) if credentials else grpc.insecure_channel(at) as channel:
        try:
            stub = admission_pb2_grpc.AdmissionServiceStub(channel)
            stub.GetQueues(pb.GetQueuesRequest(), timeout=10)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def _commands(tmp_path: Path, one: Apart, section: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`tidegate queues` with a file of its own, which only says whom to trust."""
    path = tmp_path / "commands.yaml"
    path.write_text(yaml.safe_dump({"tls": section}))
    command = [str(BIN / "tidegate"), "queues", "--config", str(path), "--address", one.books_address]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_strangers_stay_out_and_everything_is_renewed_under_traffic(
    one: Apart, ours: Authority, others: Authority, tmp_path: Path
) -> None:
    """1. Who has no certificate, another authority's, or no TLS gets nowhere, and says why in its log.
    2. It gets in when its files have been replaced, without a restart.
    3. Authority and certificates change while requests go on, and every link is made anew: none fails."""
    wait_for(lambda: one.linked() and one.ready(0), "the first edge serves", 60)
    key, cert = ((ours.folder / f"edge.{kind}").read_bytes() for kind in ("key", "pem"))
    assert _asked(one, grpc.ssl_channel_credentials(ours.trust, key, cert)) == "OK"  # 1
    assert _asked(one, grpc.ssl_channel_credentials(ours.trust)) == "UNAVAILABLE"
    assert _asked(one, None) == "UNAVAILABLE"
    done = _commands(tmp_path, one, {"ca": str(ours.ca)})
    assert (done.returncode, "this side's tls.cert must be valid" in done.stderr) == (1, True), done.stderr
    assert _commands(tmp_path, one, ours.section("edge")).returncode == 0
    wait_for(lambda: one.log().count("isn't signed by this side's tls.ca") >= 2, "both links say why not")
    assert not one.ready(1)

    for name in ("edge.key", "edge.pem", "ca.pem"):  # 2
        put(others.folder / name, (ours.folder / name).read_bytes())
    wait_for(lambda: one.ready(1), "the second edge serves")

    crowd = Crowd(one.ports, lambda _: Ask("a", tokens=20), workers=4)  # 3
    wait_for(lambda: crowd.completed() > 4, "traffic")
    first, news = _shown(one.books_address), Authority(tmp_path / "news")
    changed = one.log().count(CHANGED)
    for folder in (ours.folder, others.folder):
        put(folder / "ca.pem", ours.trust + news.trust)
    wait_for(lambda: one.log().count(CHANGED) == changed + 4, "all trust the new authority")
    news.issue("edge")
    news.issue("services")
    for name in ("services.key", "services.pem", "edge.key", "edge.pem"):
        put(ours.folder / name, (news.folder / name).read_bytes())
        put(others.folder / name, (news.folder / name).read_bytes())
    wait_for(lambda: one.log().count(CHANGED) == changed + 8, "all have new certificates")
    assert _shown(one.books_address) != first
    for folder in (ours.folder, others.folder):
        put(folder / "ca.pem", news.trust)
    wait_for(lambda: one.log().count(CHANGED) == changed + 12, "none trusts the old authority")
    opened = one.openings()
    for link in (*one.links, one.supply):
        link.cut()
    wait_for(lambda: one.openings() == opened + 2 and one.linked(), "all links are made anew")
    assert _asked(one, grpc.ssl_channel_credentials(news.trust, key, cert)) == "UNAVAILABLE"
    before = crowd.completed()
    wait_for(lambda: crowd.completed() > before + 8, "more traffic")
    seen = crowd.end()
    assert {each.end for each in seen} == {"complete"}, crowd.ends()
    one.settled()


def test_serve_speaks_https_to_clients_and_plain_grpc_on_its_sockets(tmp_path: Path, ours: Authority) -> None:
    """`tidegate serve` with both sections: ready on https, and the commands find it by its file."""
    sections = {"edge": {"tls": ours.server("edge")}, "tls": ours.section("services")}
    served = Gateway(tmp_path, {"models": {"a": simulated()}, **sections}).start(ready=False)
    try:
        wait_for(lambda: f"ready on https://127.0.0.1:{served.port}" in served.log(), "it is ready", 60)
        body = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        url = f"https://127.0.0.1:{served.port}/v1/chat/completions"
        answer = httpx.post(url, json=body, verify=ours.client(), trust_env=False, timeout=60)
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 4)
        command = [str(BIN / "tidegate"), "queues", "--json", "--config", str(served.config_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert [entry["model"] for entry in json.loads(done.stdout)["models"]] == ["a"]
    finally:
        served.close()
