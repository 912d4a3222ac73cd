"""What operators type while the gateway runs, and the example of a unary client, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gateway import BIN, Gateway, free_port, simulated, wait_for
from tidegate_serve import rundir

Make = Callable[..., Gateway]
EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "examples" / "unary_client.py"


def tidegate(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command; its output and status."""
    command = [BIN / "tidegate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def listed(one: Gateway, *arguments: str) -> list[dict[str, Any]]:
    """The leases, by the command."""
    done = tidegate("leases", "list", "--config", one.config_path, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    leases: list[dict[str, Any]] = json.loads(done.stdout)["leases"]
    return leases


def stream(one: Gateway, text: list[str]) -> threading.Thread:
    """A stream that would take minutes, read in the background."""

    def run() -> None:
        body = {
            "model": "a",
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "max_tokens": 5000,
        }
        with (
            httpx.Client(base_url=one.url, timeout=60, trust_env=False) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            text.extend(answer.iter_text())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.timeout(300)  # ten commands, each a process
def test_leases_and_queues_of_a_running_stream(gateway: Make) -> None:
    """`--config FILE` finds the private socket of `serve`; a revoked lease ends its stream in words."""
    one = gateway({"a": simulated("--token-rate", "20", max_concurrent=2), "b": simulated()}).start()
    assert listed(one) == []
    text: list[str] = []
    thread = stream(one, text)
    (lease,) = wait_for(lambda: listed(one), "the stream has a lease")
    assert (lease["model"], lease["tenant"]) == ("a", "default")
    assert isinstance(lease["age_ms"], int)
    assert listed(one, "--model", "b") == []
    shown = tidegate("leases", "list", "--config", one.config_path).stdout.splitlines()
    assert shown[0].split() == ["LEASE", "MODEL", "INSTANCE", "TENANT", "AGE", "HOLDER"]
    assert shown[1].split()[:3] == [lease["lease_id"], "a", lease["instance_id"]]
    queues = json.loads(tidegate("queues", "--config", one.config_path, "--json").stdout)
    (model,) = [model for model in queues["models"] if model["model"] == "a"]
    assert (model["queue"]["active"], model["queue"]["max_concurrent"]) == (1, 2)
    assert model["instances"][0]["effective_slots"] == 2
    assert queues["supply_settled"] is True
    table = tidegate("queues", "--config", one.config_path).stdout
    assert "1/2" in table
    assert "in touch with lifecycle" in table
    done = tidegate("leases", "revoke", lease["lease_id"], "--config", one.config_path)
    assert (done.returncode, "revoked" in done.stdout) == (0, True), done.stderr
    thread.join(20)
    assert not thread.is_alive()
    end = "".join(text)
    assert '"error"' in end
    assert "operator" in end
    assert wait_for(one.is_idle, "counts return to 0")
    again = tidegate("leases", "revoke", lease["lease_id"], "--config", one.config_path)
    assert (again.returncode, "there is no lease" in again.stderr) == (1, True)


def test_queues_are_watched_until_the_service_ends(gateway: Make) -> None:
    """`--watch --json` prints a line now and after each change; at the end of the service it says so."""
    one = gateway({"a": simulated()}).start()
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [str(BIN / "tidegate"), "queues", "--watch", "--json", "--config", str(one.config_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stderr is not None
        assert "models" in json.loads(watcher.stdout.readline())
        assert one.chat("a").status_code == 200
        for line in watcher.stdout:
            models = {model["model"]: model for model in json.loads(line)["models"]}
            if "a" in models and models["a"]["lease_ends"].get("released"):
                break
        one.stop()
        assert watcher.wait(20) == 1
        assert "admission" in watcher.stderr.read()
    gone = tidegate("queues", "--config", one.config_path)
    assert gone.returncode == 1, "the record of serve went with it"
    assert "is it running?" in gone.stderr


def test_errors_of_the_commands_say_what_to_do(tmp_path: Path) -> None:
    """1 when the service can't be reached, 2 when the command can't be used."""
    nowhere = f"127.0.0.1:{free_port()}"
    done = tidegate("queues", "--address", nowhere)
    assert (done.returncode, f"can't be reached at {nowhere}: is it running?" in done.stderr) == (1, True)
    assert tidegate("queues", "--address", f"unix:{tmp_path}/no.sock", "--watch").returncode == 1
    config = tmp_path / "tidegate.yaml"
    config.write_text(
        f"admission: {{listen: '{nowhere}'}}\nmodels: {{a: {{env: {{K: '${{NOT_SET_HERE}}'}}}}}}\n"
    )
    done = tidegate("leases", "list", "--config", config)
    assert (done.returncode, nowhere in done.stderr) == (1, True), done.stderr
    for wrong in (["--address", "nowhere"], ["--config", str(tmp_path / "missing.yaml")], []):
        done = tidegate("leases", "list", *wrong)
        assert done.returncode == 2, wrong
        assert done.stderr
        assert "Traceback" not in done.stderr


def test_a_record_counts_while_its_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that a killed `serve` left behind is passed over, and removed by the next one."""
    base = Path(tempfile.mkdtemp(dir="/tmp"))  # sockets' paths are short, so tmp_path is too long
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    config = tmp_path / "tidegate.yaml"
    dead = base / f"tidegate-{os.getuid()}-4194999-x"  # above every process id
    dead.mkdir()
    rundir.record(dead, config, {"admission": "unix:/dead"})
    assert rundir.find(config) == {}
    with rundir.made() as directory:
        assert Path(directory).parent == base
        assert not dead.exists()
        rundir.record(Path(directory), config, {"admission": "unix:/lives"})
        assert rundir.find(config) == {"admission": "unix:/lives"}
        assert rundir.find(tmp_path / "other.yaml") == {}
    assert rundir.find(config) == {}
    base.rmdir()


def test_the_help_of_the_command_is_fast() -> None:
    """No command of a person waits for gRPC to be imported before it can say what it is for."""
    code = "import sys, tidegate_serve.cli as cli\ntry: cli.main()\nfinally: print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("False")
    for noun in ("queues", "leases", "models", "explain", "events", "logs", "footprints", "devices"):
        assert f"\n    {noun}" in done.stdout


def test_the_example_of_a_unary_client(gateway: Make) -> None:
    """It starts the model by its Acquire, is listed while it is served, prints the answer, leaves nothing."""
    listen = f"127.0.0.1:{free_port()}"
    one = gateway({"a": simulated("--ttft", "4")}, admission={"listen": listen, "lease_ttl": "3s"}).start()
    with subprocess.Popen(
        [sys.executable, EXAMPLE, listen, "a", "hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        (lease,) = wait_for(lambda: listed(one), "it holds a lease")
        assert lease["holder"].startswith("unary")
        output, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    assert len(output) > 5
    (books,) = one.books().models
    assert (books.queue.active, dict(books.lease_ends)["released"]) == (0, 1), "kept for longer than its ttl"
