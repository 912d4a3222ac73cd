"""API keys as operators and clients use them: made by the command, used with OpenAI's client, revoked."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from tests.support.gateway import Gateway, simulated, wait_for
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc
from tidegate_serve import commands, rundir


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with two models, at first without keys."""
    models = {"a": simulated("--token-rate", "20", aliases=["gpt-a"]), "b": simulated()}
    sections = {"tenants": {"team": {"weight": 2}}, "edge": {"cors_origins": ["https://ops.example"]}}
    gateway = Gateway(tmp_path_factory.mktemp("keys"), {"models": models, **sections}).start()
    yield gateway
    gateway.close()


def keys(config: Path, *arguments: str, status: int = 0) -> str:
    """`tidegate keys`, in this process: what it prints; on stderr when it fails."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        done = commands.run(_parsed(*arguments, "--config", str(config)))
    assert done == status, error.getvalue()
    return (error if status else out).getvalue()


def _parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands.add(parser.add_subparsers(dest="command"))
    return parser.parse_args(["keys", *arguments])


def create(one: Gateway, *arguments: str) -> dict[str, Any]:
    """A new key, with what is told of it, once the edge knows it."""
    made: dict[str, Any] = json.loads(keys(one.config_path, "create", "--json", *arguments))

    def known() -> bool:
        nobody = one.http.get("/v1/models").status_code
        return nobody == 401 != get(one, "/v1/models", made).status_code

    wait_for(known, "the edge knows the key", 10)
    return made


def get(one: Gateway, path: str, key: dict[str, Any]) -> httpx.Response:
    return one.http.get(path, headers={"authorization": f"Bearer {key['key']}"})


def client(one: Gateway, key: dict[str, Any]) -> openai.OpenAI:
    direct = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{one.url}/v1", api_key=key["key"], http_client=direct, max_retries=0)


def chat(one: Gateway, key: dict[str, Any], model: str = "a") -> str:
    messages: Any = [{"role": "user", "content": "hello"}]
    with client(one, key) as ask:
        done = ask.chat.completions.create(model=model, messages=messages, max_tokens=3)
    return str(done.choices[0].message.content)


def test_a_key_from_its_making_to_its_end(one: Gateway) -> None:
    """The first key closes the edge; it works with OpenAI's client and x-api-key, for its own models; its
    tenant is admission's; once it is revoked it is refused within seconds, and what runs is finished."""
    team = create(one, "--name", "a team", "--tenant", "team", "--model", "gpt-a")
    assert one.chat("a").status_code == 401, "nobody else may ask any more"
    assert chat(one, team)
    assert chat(one, team, "gpt-a")
    headers = {"x-api-key": team["key"]}
    body = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    assert one.http.post("/v1/messages", json=body, headers=headers).status_code == 200
    with client(one, team) as ask:
        assert [model.id for model in ask.models.list()] == ["a"]
    with pytest.raises(openai.PermissionDeniedError) as denied:
        chat(one, team, "b")
    assert denied.value.code == "permission_denied"
    assert denied.value.request_id

    text: list[str] = []
    leave = threading.Event()
    thread = threading.Thread(target=_endless, args=(one, team, text, leave), daemon=True)
    thread.start()
    lease = wait_for(lambda: _leases(one), "it is served")[0]
    assert (lease.tenant, lease.model) == ("team", "a")
    assert team["id"] in keys(one.config_path, "revoke", team["id"])
    wait_for(lambda: get(one, "/v1/models", team).status_code == 401, "it is refused", 5)
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        chat(one, team)
    so_far = len(text)
    wait_for(lambda: len(text) > so_far, "what runs goes on")
    leave.set()
    thread.join(30)


def _endless(one: Gateway, key: dict[str, Any], text: list[str], leave: threading.Event) -> None:
    """Reads a stream that would take minutes until it ends or is to be left."""
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5000, "stream": True}
    headers = {"authorization": f"Bearer {key['key']}", "x-tidegate-tenant": "someone"}
    with (
        httpx.Client(base_url=one.url, timeout=60, trust_env=False) as http,
        http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer,
    ):
        for piece in answer.iter_text():
            text.append(piece)
            if leave.is_set():
                return


def _leases(one: Gateway) -> list[pb.Lease]:
    """The leases, by admission's books."""
    with grpc.insecure_channel(
        rundir.find(one.config_path)["admission"], options=[("grpc.default_authority", "tidegate")]
    ) as channel:
        stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        return list(stub.ListLeases(pb.ListLeasesRequest(), timeout=5).leases)


def test_an_operators_key_orders_by_http(one: Gateway) -> None:
    """Load, pin, unpin and unload a model, and end a lease, as the commands do; no model is asked with it."""
    operator = create(one, "--scope", "operator")
    headers = {"authorization": f"Bearer {operator['key']}"}

    def order(path: str, **more: str) -> httpx.Response:
        return one.http.post(f"/gateway/{path}", headers=headers | more)

    def state(model: str) -> str:
        return str(get(one, "/gateway/status", operator).json()["models"][model]["state"])

    assert order("models/b/load").json()["model"] == "b"
    wait_for(lambda: state("b") == "ready", "it is loaded", 60)
    assert order("models/b/pin").json() == {"model": "b", "pinned": True}
    assert order("models/b/unpin").json() == {"model": "b", "pinned": False}
    assert order("models/b/unload").json()["instances"] == 1
    wait_for(lambda: state("b") == "stopped", "it is stopped", 60)
    assert order("models/none/load").status_code == 404
    assert order("leases/nobody%2F1/revoke").status_code == 404
    assert order("models/b/load", origin="https://evil.example").status_code == 403
    with pytest.raises(openai.PermissionDeniedError):
        chat(one, operator)

    actor = create(one, "--act-as")
    text: list[str] = []
    thread = threading.Thread(target=_endless, args=(one, actor, text, threading.Event()), daemon=True)
    thread.start()
    lease = wait_for(lambda: _leases(one), "it is served")[0]
    assert lease.tenant == "someone"
    assert order(f"leases/{lease.lease_id}/revoke").json()["revoked"] is True
    thread.join(30)
    assert "An operator ended this request." in "".join(text)


def test_the_command_keeps_the_file(tmp_path: Path) -> None:
    """Private, written whole, with hashes alone; the list never shows a key; what is wrong is said."""
    config, path = tmp_path / "t.yaml", tmp_path / "k.json"
    config.write_text("edge: {keys_file: k.json}")
    assert keys(config, "list") == "no keys\n"
    secret = keys(config, "create", "--name", "ci", "--expires", "30d").strip()
    assert secret.startswith("tg-")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    other = json.loads(keys(config, "create", "--json", "--model", "a", "--model", "b"))
    assert path.stat().st_mode & 0o777 == 0o640, "what its owner has chosen stays"
    assert secret not in path.read_text()
    listed = keys(config, "list")
    assert secret not in listed
    assert f"{secret[:9]}…" in listed
    told = json.loads(keys(config, "list", "--json"))["keys"]
    assert [one["state"] for one in told] == ["valid", "valid"]
    assert "hash" not in str(told)
    assert told[1]["models"] == ["a", "b"]
    assert other["id"] in keys(config, "revoke", other["id"])
    assert "revoked" in keys(config, "list")
    assert "there is no key x" in keys(config, "revoke", "x", status=1)
    for wrong in (["--tenant", "a b"], ["--model", ""], ["--scope", "all"], ["--expires", "30"]):
        assert "is not allowed; give" in keys(config, "create", *wrong, status=2)
    path.chmod(0o666)
    assert "chmod go-w" in keys(config, "create", status=1)
    path.chmod(0o600)
    path.write_text('{"version": 1, "keys": [{"id": "x"}]}')
    assert "keys.0.hash: is required" in keys(config, "list", status=1)
    assert [one.name for one in tmp_path.iterdir() if one.name not in ("t.yaml", "k.json")] == []


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    """Writers wait for each other."""
    config = tmp_path / "t.yaml"
    config.write_text("edge: {}")
    arguments = _parsed("create", "--config", str(config))
    out = io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
        ThreadPoolExecutor(8) as pool,
    ):
        assert set(pool.map(lambda _: commands.run(arguments), range(40))) == {0}
    told = json.loads(keys(config, "list", "--json"))["keys"]
    assert {one["prefix"] for one in told} == {secret[:9] for secret in out.getvalue().split()}
    assert len(told) == 40
