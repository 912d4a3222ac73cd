"""An edge that asks for keys: who may do what, and what the model server never sees."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.edge.conftest import CHAT, Bench, Make
from tests.edge.fakes import Answer, ask, echo
from tests.edge.keyfiles import bearer, key, put, running, secret
from tests.support.until import until
from tidegate.admission.v1 import admission_pb2 as ad
from tidegate_chassis.keyfile import KeyFile
from tidegate_edge.envelope import Failure
from tidegate_edge.guard import Guard
from tidegate_edge.routes import By, Routes
from tidegate_edge.settings import EdgeSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = (
    key("all"),
    key("team", tenant="team-a", models=["warm", "org/Plain-7B"]),
    key("alias", models=["gpt-small"]),
    key("actor", tenant="team-b", act_as=True),
    key("operator", scopes=["operator"]),
    key("old").model_copy(update={"expires": 1_000_000_000.0}),
    key("revoked").model_copy(update={"revoked": 1_000_000_000.0}),
)
OPERATORS = ("/gateway/status", "/metrics")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    """An edge with the keys above."""
    folder = tmp_path_factory.mktemp("keys")
    put(folder / "tidegate-keys.json", *KEYS)
    async with running(folder, echo()) as bench:
        yield bench


async def chat(one: Bench, model: str = "small", path: str = CHAT, **headers: str) -> Answer:
    return await ask(one.edge.port, "POST", path, {"model": model}, **headers)


async def get(one: Bench, path: str, **headers: str) -> Answer:
    return await ask(one.edge.port, "GET", path, b"", **headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": bearer("unknown")},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {secret('all')}"},
        {"authorization": secret("all")},
        {"authorization": bearer("all") + "x"},
        {"authorization": bearer("all")[:-1]},
        {"x_api_key": secret("unknown")},
        {"authorization": bearer("unknown"), "x_api_key": secret("all")},
        {"authorization": bearer("old")},
        {"authorization": bearer("revoked")},
        {"authorization": f"Bearer {KEYS[0].hash}"},
    ],
    ids=range(12),
)
async def test_nobody_asks_without_a_valid_key(one: Bench, headers: dict[str, str]) -> None:
    """401 in the envelope, with the scheme, before anything is read or queued; what is open stays open."""
    seen = len(one.server.seen)
    answers = [await chat(one, **headers), await get(one, "/v1/models", **headers)]
    answers += [await get(one, path, **headers) for path in ("/v1/models/small", *OPERATORS)]
    answers.append(await ask(one.edge.port, "POST", "/gateway/models/small/unload", b"", **headers))
    for answer in answers:
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.header("www-authenticate") == "Bearer"
        assert answer.header("x-request-id")
        assert (
            "tg-" not in answer.error["message"]
            or "is expired" in str(answer.body)
            or "revoked" in str(answer.body)
        )
    assert len(one.server.seen) == seen
    for path in ("/health", "/ready", "/openapi.json"):
        assert (await get(one, path, **headers)).status == 200


@pytest.mark.parametrize("path", [route.path for route in Routes().all() if route.by is By.BODY])
async def test_each_route_takes_both_fields_and_keeps_them(one: Bench, path: str) -> None:
    """Authorization and x-api-key, however they are written; neither is ever forwarded."""
    seen = len(one.server.seen)
    for headers in (
        {"authorization": bearer("all")},
        {"Authorization": bearer("all").replace("Bearer ", "bearer  ")},
        {"x_api_key": secret("all")},
        {"X-Api-Key": secret("all"), "authorization": "Basic eDp5"},
    ):
        assert (await chat(one, path=path, **headers)).status == 200
    new = one.server.seen[seen:]
    assert len(new) == 4
    for request in new:
        assert not request.header(b"authorization")
        assert not request.header(b"x-api-key")
        assert b"tg-" not in str((request.line, request.headers, request.body)).encode()


async def test_a_key_reaches_its_own_models_alone(one: Bench) -> None:
    """403 for others, nothing queued; the list leaves them out; an alias stands for its model."""
    team = {"authorization": bearer("team")}
    assert (await chat(one, "warm", **team)).status == 200
    acquired = len(one.admission.acquired)
    for name in ("small", "gpt-small"):
        answer = await chat(one, name, **team)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (
            403,
            "permission_denied",
            "model",
        )
    assert len(one.admission.acquired) == acquired
    assert (await chat(one, "none", **team)).status == 404
    listed = json.loads((await get(one, "/v1/models", **team)).body)["data"]
    assert [entry["id"] for entry in listed] == ["org/Plain-7B", "warm"]
    assert (await get(one, "/v1/models/warm", **team)).status == 200
    answer = await get(one, "/v1/models/small", **team)
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    for name in ("small", "gpt-small"):
        assert (await chat(one, name, authorization=bearer("alias"))).status == 200
    assert (await chat(one, "warm", authorization=bearer("alias"))).status == 403


async def test_the_tenant_is_the_keys(one: Bench) -> None:
    """What a request says of itself counts only with act_as; without it, the key's tenant."""
    said = {"x_tidegate_tenant": "someone", "x_tidegate_priority": "high"}

    async def ticket(model: str, **headers: str) -> tuple[str, Any]:
        assert (await chat(one, model, **headers)).status == 200
        last = one.admission.acquired[-1]
        return last.tenant, last.band

    assert await ticket("warm", authorization=bearer("team"), **said) == ("team-a", ad.BAND_NORMAL)
    assert await ticket("warm", authorization=bearer("actor"), **said) == ("someone", ad.BAND_HIGH)
    assert await ticket("warm", authorization=bearer("actor")) == ("team-b", ad.BAND_NORMAL)
    answer = await chat(one, authorization=bearer("actor"), x_tidegate_tenant="a b")
    assert (answer.status, answer.error["code"]) == (400, "invalid_header")
    assert (await chat(one, authorization=bearer("all"), x_tidegate_tenant="a b")).status == 200


async def test_scopes_are_apart(one: Bench) -> None:
    """Operators see and order, and ask no models; everybody else the other way round."""
    operator, other = {"authorization": bearer("operator")}, {"authorization": bearer("all")}
    for path in OPERATORS:
        assert (await get(one, path, **operator)).status == 200
        answer = await get(one, path, **other)
        assert (answer.status, answer.error["code"]) == (403, "permission_denied")
        assert "operator" in answer.error["message"]
    answer = await ask(one.edge.port, "POST", "/gateway/models/small/load", b"", **other)
    assert (answer.status, answer.error["code"]) == (403, "permission_denied")
    for answer in (await chat(one, **operator), await get(one, "/v1/models", **operator)):
        assert (answer.status, answer.error["code"]) == (403, "permission_denied")


async def test_the_access_line_names_the_key_by_its_id(one: Bench) -> None:
    """Never by itself; no line of the log holds one."""
    await chat(one, "small", authorization=bearer("all"), x_request_id="the-one")

    def line() -> dict[str, Any] | None:
        return next((one for one in one.edge.lines() if one.get("request_id") == "the-one"), None)

    assert (await until(line, "its access line"))["key"] == "all"
    assert "tg-" not in one.edge.log()


async def test_a_changed_file_is_in_effect_within_seconds(one: Bench) -> None:
    """New keys, revoked ones; a file that can't be used is refused, and shown, and the last one stays."""
    path, fresh = one.edge.path.parent / "tidegate-keys.json", {"authorization": bearer("fresh")}

    async def status(**headers: str) -> int:
        return (await chat(one, **headers)).status

    async def becomes(wanted: int) -> bool:
        return await status(**fresh) == wanted

    async def told() -> list[str]:
        answer = await get(one, "/gateway/status", authorization=bearer("operator"))
        problems: list[str] = json.loads(answer.body)["edge"]["keys_problems"]
        return problems

    async def refused() -> float:
        answer = await get(one, "/metrics", authorization=bearer("operator"))
        lines = answer.body.decode().splitlines()
        return float(
            next(line for line in lines if line.startswith("tidegate_edge_keys_file_refused")).split()[1]
        )

    assert await status(**fresh) == 401
    put(path, *KEYS, key("fresh"))
    await until(lambda: becomes(200), "the new key is known")

    async def says(words: str) -> bool:
        return words in str(await told())

    async def good() -> bool:
        return not await told()

    path.write_text('{"version": 1, "keys": [{"id": "fresh"}]}')
    await until(lambda: says("keys.0.hash: is required"), "the file is refused")
    assert await refused() == 1
    assert await status(**fresh) == 200, "what was in effect stays"
    assert (await get(one, "/ready")).status == 200
    put(path, *KEYS, key("fresh"))
    await until(good, "the file is good again")
    assert await refused() == 0
    path.chmod(0o666)
    await until(lambda: says("chmod go-w"), "others may write it")
    path.unlink()
    await until(lambda: says("gone"), "it is gone")
    assert await status() == 401, "a file that is gone opens nothing"
    put(path, *KEYS, key("fresh").model_copy(update={"revoked": 1_000_000_000.0}))
    await until(lambda: becomes(401), "it is revoked")
    put(path)

    async def nobody() -> bool:
        return await status(authorization=bearer("all")) == 401

    await until(nobody, "a file without keys lets nobody in")
    put(path, *KEYS)

    async def back() -> bool:
        return await status(authorization=bearer("all")) == 200

    await until(back, "the keys are back")
    assert await until(
        lambda: [line for line in one.edge.lines() if "the key file is refused" in str(line.get("event"))],
        "the log says so",
    )


@pytest.mark.asyncio(loop_scope="function")
async def test_without_a_key_file_this_machine_may_ask_until_there_is_one(bench: Make) -> None:
    """On loopback everything is open, but nobody is believed, and keys sent all the same stay here. Then the
    first key is made, and counts at once."""
    one = await bench(echo())
    headers = {"authorization": "Bearer x", "x_api_key": "y", "x_tidegate_tenant": "someone"}
    assert (await chat(one, **headers)).status == 200
    assert not one.server.seen[0].header(b"authorization")
    assert not one.server.seen[0].header(b"x-api-key")
    assert one.admission.acquired[0].tenant == ""
    assert (await get(one, "/gateway/status")).status == 200
    put(one.edge.path.parent / "tidegate-keys.json", key("a"))

    async def closed() -> bool:
        return (await chat(one)).status == 401

    await until(closed, "a key is needed")
    assert (await chat(one, authorization=bearer("a"))).status == 200


@pytest.mark.asyncio(loop_scope="function")
async def test_auth_none_checks_nothing_and_passes_credentials_on(bench: Make, tmp_path: Path) -> None:
    """They are the model server's business then; callers are believed; a key file has no function. Reachable
    from elsewhere, the operators' routes are closed."""
    put(tmp_path / "tidegate-keys.json", key("a"))
    one = await bench(echo(), auth="none", listen="0.0.0.0:0")
    headers = {"authorization": "Bearer x", "x_api_key": "y", "x_tidegate_tenant": "someone"}
    assert (await chat(one, **headers)).status == 200
    assert one.server.seen[0].header(b"authorization") == b"Bearer x"
    assert one.server.seen[0].header(b"x-api-key") == b"y"
    assert one.admission.acquired[0].tenant == "someone"
    assert (await get(one, "/v1/models")).status == 200
    for path in OPERATORS:
        answer = await get(one, path)
        assert (answer.status, answer.error["code"]) == (403, "permission_denied")
    answer = await ask(one.edge.port, "POST", "/gateway/models/small/load")
    assert (answer.status, answer.error["code"]) == (403, "permission_denied")


@pytest.mark.parametrize(
    ("settings", "operators", "believed"),
    [
        ({}, True, False),
        ({"auth": "none"}, True, True),
        ({"auth": "none", "listen": "0.0.0.0:80"}, False, True),
        ({"auth": "none", "listen": "0.0.0.0:80", "open_operations": True}, True, True),
    ],
)
async def test_who_everybody_is_without_keys(
    settings: dict[str, Any], operators: bool, believed: bool
) -> None:
    """Operators on this machine; elsewhere only when the settings say so."""
    guard = Guard(EdgeSettings(**settings), Path("none"), KeyFile(exists=False))
    assert guard.inference(b"", b"").act_as is believed
    if operators:
        assert guard.operator(b"", b"").operator
        return
    with pytest.raises(Failure, match="closed") as failed:
        guard.operator(b"Bearer x", b"y")
    assert failed.value.status == 403
