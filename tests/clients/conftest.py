"""One gateway, one process for each client, and the server behind, asked directly."""

from __future__ import annotations

import base64
import hashlib
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.clients import missing
from tests.clients.programs import CLIENTS, Client
from tests.support.figures import Figures
from tests.support.gateway import BIN, Gateway, simulated, wait_for

SOUND = base64.b64encode(b"RIFF" + bytes(range(256)) * 8).decode()
IMAGE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(64)).decode()


class Behind:
    """The model server behind the gateway."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._http = httpx.Client(base_url=address, timeout=30, trust_env=False)

    def post(self, path: str, **body: Any) -> Any:
        """Its own answer to a request."""
        answer = self._http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json() if answer.headers["content-type"] == "application/json" else answer.content

    def post_file(self, path: str, content: str) -> Any:
        """Its own answer to a file, given in base64."""
        return self._http.post(path, files={"file": ("a.wav", base64.b64decode(content))}).json()

    def fault(self, fault: str, **fields: Any) -> None:
        """Sets a fault on it."""
        assert self._http.post("/simulator/faults", json={"fault": fault, **fields}).status_code == 200

    def clear(self) -> None:
        """Nothing goes wrong, and nothing has arrived yet."""
        self._http.delete("/simulator/faults")
        self._http.delete("/simulator/requests")

    def arrived(self, *paths: str) -> list[dict[str, Any]]:
        """What has arrived on these paths."""
        entries = self._http.get("/simulator/requests").json()["requests"]
        return [entry for entry in entries if entry["path"] in paths]

    def close(self) -> None:
        self._http.close()


class Scene:
    """The gateway and everybody around it."""

    def __init__(self, gateway: Gateway) -> None:
        self.key = _key(gateway, "--scope", "inference", "--scope", "operator")
        self.narrow_key = _key(gateway, "--model", "slow")
        """A key for one model alone."""
        gateway.http.headers["authorization"] = f"Bearer {self.key}"
        self.gateway = gateway.start()
        self._clients: dict[str, Client] = {}
        self._behind: dict[str, Behind] = {}

    def client(self, name: str) -> Client:
        """A client by its name in CLIENTS."""
        if name not in self._clients:
            self._clients[name] = Client(name, {"url": self.gateway.url, "key": self.key})
        return self._clients[name]

    def ready(self, names: Iterable[str]) -> list[Client]:
        """Clients that have been started, so that nobody waits for one that is still being imported."""
        clients = [self.client(name) for name in names]
        for client in clients:
            client.begin("routes")
        for client in clients:
            client.result()
        return clients

    def behind(self, model: str = "chat") -> Behind:
        """The server of a model, loaded when it isn't."""
        if model not in self._behind:
            assert self.gateway.chat(model).status_code == 200
            (address,) = (one["address"] for one in self.gateway.instances() if one["model"] == model)
            self._behind[model] = Behind(address)
        return self._behind[model]

    def refused(self, code: str) -> float:
        """How often the gateway has refused for that reason."""
        metrics = Figures(self.gateway.http.get("/metrics").text)
        return metrics.total("tidegate_edge_refusals_total", code=code)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        for server in self._behind.values():
            server.close()
        self.gateway.close()


def _key(gateway: Gateway, *flags: str) -> str:
    done = subprocess.run(
        [BIN / "tidegate", "keys", "create", "--config", gateway.config_path, *flags],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One client after another, so that workers seldom start the same one."""
    here = [at for at, item in enumerate(items) if Path(__file__).parent in item.path.parents]
    for at, item in zip(here, sorted((items[at] for at in here), key=_client), strict=True):
        items[at] = item


def _client(item: pytest.Item) -> str:
    name = (
        item.callspec.params.get("name")
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else None
    )
    return str(name or "~ all of them")


@pytest.fixture(scope="package")
def _scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    if reason := missing():
        pytest.skip(reason)
    models = {
        "chat": simulated("--default-tokens", "12", aliases=["gpt-alias"], vram="1GiB"),
        "slow": simulated("--token-rate", "4", "--default-tokens", "400", vram="1GiB"),
        "busy": simulated("--token-rate", "4", max_concurrent=1, max_queue=3, vram="1GiB"),
        "line": simulated("--token-rate", "20", max_concurrent=1, vram="1GiB"),
        "huge": simulated(vram="100GiB"),
    }
    edge = {"keepalive_after": "200ms", "max_body": "1MiB"}
    scene = Scene(Gateway(tmp_path_factory.mktemp("clients"), {"models": models, "edge": edge}))
    yield scene
    scene.close()


@pytest.fixture
def scene(_scene: Scene) -> Iterator[Scene]:
    """The scene, in which nothing is going on before and after."""
    yield _scene
    for behind in _scene._behind.values():
        behind.clear()
    wait_for(_scene.gateway.is_idle, "every slot is free")


def having(route: str, *, both: bool = False) -> pytest.MarkDecorator:
    """The test once for each client that has the route; with `both` also once for each that can stream it."""
    found: list[Any] = []
    for name, program in CLIENTS.items():
        if route not in program.routes:
            continue
        if not both:
            found.append(pytest.param(name, id=name))
            continue
        found.append(pytest.param(name, False, id=name))
        if route not in program.whole:
            found.append(pytest.param(name, True, id=f"{name}-streamed"))
    return pytest.mark.parametrize(("name", "stream") if both else "name", found)


def digest(data: bytes) -> str:
    """A long answer in short, as the programs give it."""
    return hashlib.sha256(data).hexdigest()
