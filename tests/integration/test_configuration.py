"""Bad configurations, ports and folders: said at once, with path and range, before anything starts."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.gateway import BIN, Gateway, simulated

Make = Callable[..., Gateway]

BAD = """
edge: {workers: 0, max_body: 1B, response_timeout: 5, listen: 0.0.0.0:8080, nonsense: 1}
admission: {max_concurrent: -1, max_queue: 100000, lease_ttl: [], queue_timeout: "never"}
lifecycle: {runtime: podman, devices: [{id: gpu0, memory: lots}]}
models:
  "bad name": {engine: command, command: [x]}
  a: {engine: command}
  b: {engine: fast}
  c: {engine: external, urls: ["ftp://x"]}
telemetry: {sample: 2}
typo: {}
"""


def _check(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "tidegate", "config", "check", path], capture_output=True, text=True, timeout=60
    )


def test_every_problem_is_printed_at_once(tmp_path: Path) -> None:
    """`tidegate config check` prints each problem with its path and what is allowed, and exits with 78."""
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    done = _check(path)
    assert done.returncode == 78
    for name in (
        "edge.workers", "edge.max_body", "edge.response_timeout", "edge.nonsense", "admission.max_concurrent",
        "admission.max_queue", "admission.lease_ttl", "admission.queue_timeout", "lifecycle.runtime",
        "lifecycle.devices.0.memory", "models.bad name", "models.a", "models.b.engine", "models.c.urls",
        "telemetry.sample", "typo",
    ):  # fmt: skip
        assert any(line.startswith(name) for line in done.stdout.splitlines()), (name, done.stdout)
    assert "from 1 to 64" in done.stdout
    assert "from 60s to 3600s" in done.stdout


def test_a_good_file_passes(tmp_path: Path) -> None:
    """The demo's configuration is valid, and the command says so."""
    done = _check(Path("deploy/demo.yaml"))
    assert (done.returncode, "valid" in done.stdout) == (0, True), done.stdout


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    """A file that isn't there, or isn't YAML, is one clear problem."""
    done = _check(tmp_path / "nowhere.yaml")
    assert done.returncode == 78
    assert "nowhere.yaml can't be read: No such file" in done.stdout
    (tmp_path / "twice.yaml").write_text("edge: {workers: 1, workers: 2}")
    assert "'workers' is given twice" in _check(tmp_path / "twice.yaml").stdout


@pytest.mark.parametrize("service", ["serve", "edge", "admission", "lifecycle"])
def test_a_service_refuses_a_bad_file_with_78(tmp_path: Path, service: str) -> None:
    """Each command refuses what it can't use before it starts anything."""
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    done = subprocess.run(
        [BIN / "tidegate", service, "--config", path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 78
    assert ": " in done.stderr


def test_a_taken_port_is_said(gateway: Make) -> None:
    """`serve` ends with 78 when its port is taken, and says what to look for."""
    one = gateway({"a": simulated()})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", one.port))
        taken.listen()
        one.start(ready=False)
        assert one.process is not None
        assert one.process.wait(60) == 78
    assert "edge.listen" in one.log()
    assert "ss -ltnp" in one.log()


def test_a_data_directory_in_use_is_said(gateway: Make, tmp_path: Path) -> None:
    """A second `serve` on the same data directory ends with 78 and leaves the first one alone."""
    lifecycle = {"data_dir": str(tmp_path / "data")}
    first = gateway({"a": simulated()}, lifecycle=lifecycle).start()
    second = gateway({"a": simulated()}, lifecycle=lifecycle).start(ready=False)
    assert second.process is not None
    assert second.process.wait(60) == 78
    assert "lifecycle.data_dir" in second.log()
    assert first.chat("a").status_code == 200


def test_a_data_directory_that_cannot_be_made_is_said(gateway: Make, tmp_path: Path) -> None:
    """A data directory below a file ends `serve` with 78."""
    (tmp_path / "file").write_text("")
    one = gateway({"a": simulated()}, lifecycle={"data_dir": str(tmp_path / "file" / "data")})
    one.start(ready=False)
    assert one.process is not None
    assert one.process.wait(60) == 78
    assert "lifecycle.data_dir" in one.log()
