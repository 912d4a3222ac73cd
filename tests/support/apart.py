"""The three services as processes of their own, any number of edges, and a proxy on each link."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import yaml

from tests.support.figures import Figures, scrape
from tests.support.gateway import BIN, Gateway, free_port, wait_for
from tests.support.proxy import Proxy
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc

ADMISSION = "tidegate_admission_"


class Apart:
    """Lifecycle, admission and edges. Services are named lifecycle, admission, edge0, edge1, ..."""

    def __init__(
        self,
        folder: Path,
        models: dict[str, Any],
        *,
        edges: int = 1,
        edge: Mapping[str, Any] | None = None,
        edge_tls: Sequence[Mapping[str, str]] = (),
        **sections: dict[str, Any],
    ) -> None:
        """`edge`: settings of all edges, `edge_tls` the section `tls` of each. Each edge reaches admission
        through `links[i]`, admission reaches lifecycle through `supply`."""
        listen = {name: free_port() for name in ("admission", "lifecycle", "metrics")}
        self.books_address = f"127.0.0.1:{listen['admission']}"
        self.metrics_address = f"127.0.0.1:{listen['metrics']}"
        self.supply = Proxy(listen["lifecycle"])
        self.links = [Proxy(listen["admission"]) for _ in range(edges)]
        self.ports = [free_port() for _ in range(edges)]
        self._tls = sections.get("tls", {})
        self.base = Gateway(folder, {"models": models, **self._sections(listen, sections)})
        self._paths = dict.fromkeys(("lifecycle", "admission"), self.base.config_path)
        for number, (port, link) in enumerate(zip(self.ports, self.links, strict=True)):
            own = {
                "listen": f"127.0.0.1:{port}",
                "admission_address": link.address,
                "lifecycle_address": f"127.0.0.1:{listen['lifecycle']}",
                **(edge or {}),
            }
            self._paths[f"edge{number}"] = folder / f"edge{number}.yaml"
            written = {"edge": own, **({"tls": dict(edge_tls[number])} if edge_tls else {})}
            self._paths[f"edge{number}"].write_text(yaml.safe_dump(written))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._killed: set[str] = set()
        self._before = Counter[str]()

    def _sections(self, listen: dict[str, int], given: dict[str, dict[str, Any]]) -> dict[str, Any]:
        own = {
            "admission": {
                "listen": self.books_address,
                "metrics_listen": self.metrics_address,
                "lifecycle_address": self.supply.address,
            },
            "lifecycle": {"listen": f"127.0.0.1:{listen['lifecycle']}"},
        }
        return {**given, **{name: section | given.get(name, {}) for name, section in own.items()}}

    def start(self, *services: str) -> Apart:
        """Starts services; when none is named all of them, and waits until all know of each other."""
        for service in services or self._paths:
            with self.base.log_path.open("ab") as log:
                self.processes[service] = subprocess.Popen(
                    [BIN / "tidegate", service.rstrip("0123456789"), "--config", self._paths[service]],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.base.environ,
                    start_new_session=True,
                )
            self._killed.discard(service)
        if not services:
            numbers = range(len(self.ports))
            wait_for(lambda: self.linked() and all(map(self.ready, numbers)), "all are ready", 60)
        return self

    def ready(self, number: int = 0) -> bool:
        """Whether an edge can serve."""
        return self._says(number, "/ready")

    def lives(self, number: int = 0) -> bool:
        """Whether an edge answers at all."""
        return self._says(number, "/health")

    def _says(self, number: int, path: str) -> bool:
        try:
            return self.get(number, path).status_code == 200
        except httpx.TransportError:
            return False

    def get(self, number: int, path: str) -> httpx.Response:
        """A page of an edge."""
        return httpx.get(f"http://127.0.0.1:{self.ports[number]}{path}", timeout=10, trust_env=False)

    def send(self, service: str, number: int) -> None:
        """A signal for a service."""
        self.processes[service].send_signal(number)

    def kill(self, service: str) -> None:
        """kill -9."""
        self._killed.add(service)
        self.processes[service].kill()
        self.processes[service].wait()

    def books(self) -> pb.Queues:
        """Admission's own books, asked for without any edge."""
        with self._channel() as channel:
            stub = admission_pb2_grpc.AdmissionServiceStub(channel)
            return stub.GetQueues(pb.GetQueuesRequest(), timeout=5).queues

    def _channel(self) -> grpc.Channel:
        if not self._tls:
            return grpc.insecure_channel(self.books_address)
        ca, key, cert = (Path(self._tls[name]).read_bytes() for name in ("ca", "key", "cert"))
        return grpc.secure_channel(self.books_address, grpc.ssl_channel_credentials(ca, key, cert))

    def queue(self, model: str) -> pb.QueueState:
        """One model's queue, by these books."""
        found = [entry.queue for entry in self.books().models if entry.model == model]
        return found[0] if found else pb.QueueState()

    def session(self, number: int) -> pb.SessionInfo | None:
        """An edge's session, by these books; None when admission knows of none."""
        holder = f":{self.processes[f'edge{number}'].pid}"
        found = [session for session in self.books().sessions if session.holder.endswith(holder)]
        return found[0] if found else None

    def connected(self, number: int = 0) -> bool:
        """Whether an edge's session is open, as that edge sees it."""
        return self.edge_figures(number).total("tidegate_edge_session_connected") == 1

    def linked(self) -> bool:
        """Whether admission hears a settled lifecycle; False while it can't be asked."""
        try:
            return self.figures().total(ADMISSION + "supply_settled") == 1
        except httpx.TransportError:
            return False

    def openings(self) -> int:
        """How often a session of any edge was opened."""
        return self.log().count("the session is open ")

    def figures(self) -> Figures:
        """Admission's metrics, which must balance whenever they are asked for."""
        figures = scrape(self.metrics_address)
        assert figures.total(ADMISSION + "conservation_error") == 0
        return figures

    def edge_figures(self, number: int = 0) -> Figures:
        """An edge's metrics."""
        return scrape(f"127.0.0.1:{self.ports[number]}")

    def mark(self) -> None:
        """What is counted begins here: for services that several tests share."""
        self._before = self._counts()

    def ends(self) -> dict[str, int]:
        """How leases have ended, by name; what never happened is left out."""
        counted = self._counts() - self._before
        return {name: count for name, count in counted.items() if name not in ("granted", "restated")}

    def granted(self) -> int:
        """How many tickets became leases."""
        return (self._counts() - self._before)["granted"]

    def restated(self) -> int:
        """How many leases admission was told of that it didn't know."""
        return (self._counts() - self._before)["restated"]

    def _counts(self) -> Counter[str]:
        figures = self.figures()
        ends = figures.by(ADMISSION + "lease_ends_total", "end")
        granted = figures.total(ADMISSION + "grants_total")
        restated = figures.total(ADMISSION + "restated_leases_total")
        counts = {**ends, "granted": granted, "restated": restated}
        return Counter({name: int(count) for name, count in counts.items()})

    def is_idle(self) -> bool:
        """Nothing waits, nothing is held: by admission's books and by every edge that lives."""
        if any(entry.queue.waiting or entry.queue.active for entry in self.books().models):
            return False
        gauges = ("in_flight", "tickets", "leases", "buffered_bytes")
        edges = [number for number in range(len(self.ports)) if f"edge{number}" not in self._killed]
        return not any(
            self.edge_figures(number).total("tidegate_edge_" + gauge) for number in edges for gauge in gauges
        )

    def settled(self, seconds: float = 15.0) -> None:
        """The end of every test: all is idle, and the balance is exact."""
        wait_for(self.is_idle, "counts return to 0", seconds)
        self.figures()

    def close(self) -> None:
        """Stops everything in good order; nothing may be left, and nothing may have gone wrong unheard."""
        for link in (*self.links, self.supply):
            link.restore()
        living = {name: process for name, process in self.processes.items() if process.poll() is None}
        for process in living.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        statuses = {name: process.wait(15) for name, process in living.items()}
        for link in (*self.links, self.supply):
            link.close()
        self.base.close()
        assert statuses == dict.fromkeys(self.processes.keys() - self._killed, 0), self.base.log()
        assert "Traceback" not in self.base.log(), self.base.log()

    def log(self) -> str:
        """All that the services have logged."""
        return self.base.log()

    def servers(self) -> list[int]:
        """Pids of the model servers."""
        return self.base.servers()
