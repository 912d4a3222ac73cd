"""What operators type about models, their events and logs while the gateway runs, as a user types it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import BIN, Gateway, free_port, simulated, wait_for
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_serve.loading import phase
from tidegate_serve.logs import unseen

Make = Callable[..., Gateway]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway whose 24 GiB hold two or three of its models."""
    folder = tmp_path_factory.mktemp("operators")
    models = {
        "a": simulated("--log-lines", "3", "--load-time", "0.1", aliases=["alias-of-a"]),
        "b": simulated(vram="20GiB"),
        "slow": simulated("--load-time", "3", vram="2GiB"),
        "giant": simulated(vram="30GiB"),
        "broken": {
            "engine": "command",
            "vram": "1GiB",
            "command": [sys.executable, "-c", "raise SystemExit('no weights here')", "{port}"],
        },
        "elsewhere": {"engine": "external", "urls": [f"http://127.0.0.1:{free_port()}"]},
    }
    one = Gateway(folder, {"models": models}).start()
    yield one
    one.close()


class Command:
    """The command with one gateway's file."""

    def __init__(self, one: Gateway) -> None:
        self.where = ["--config", str(one.config_path)]

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """What it prints: on stdout when it is to succeed, on stderr when it is to fail."""
        command = [str(BIN / "tidegate"), *arguments, *self.where]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, (arguments, done.stdout, done.stderr)
        return done.stderr if status else done.stdout

    def json(self, *arguments: str) -> Any:
        """Its answer as data."""
        return json.loads(self(*arguments, "--json"))

    def model(self, name: str) -> dict[str, Any]:
        """One model, as `models list --json` shows it."""
        (model,) = [one for one in self.json("models", "list")["models"] if one["model"] == name]
        return dict(model)

    def row(self, name: str) -> list[str]:
        """One model's row in the table."""
        (row,) = [line for line in self("models", "list").splitlines() if line.startswith(f"{name} ")]
        return row.split()

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[Background]:
        """The command in the background."""
        command = [str(BIN / "tidegate"), *arguments, *self.where]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        background = Background(process)
        try:
            yield background
        finally:
            background.interrupt()


class Background:
    """A command that runs; what it has printed so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=kept.extend, args=(stream,), daemon=True)
            for kept, stream in ((self.out, process.stdout), (self.err, process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def interrupt(self) -> int:
        """Ctrl-C; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        status = self.process.wait(20)
        for reader in self._readers:
            reader.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return status

    def says(self, word: str) -> bool:
        """It has printed a word."""
        return any(word in line for line in [*self.out, *self.err])


def test_a_model_is_loaded_listed_and_unloaded(shared: Gateway) -> None:
    """`load` by an alias returns when it is ready; the list shows where it runs; `unload` ends its server."""
    tidegate = Command(shared)
    assert tidegate.row("a") == ["a", "stopped", "10GiB", "declared", "-", "-", "-", "-"]
    assert tidegate("models", "load", "alias-of-a").startswith("a is ready after ")
    row = tidegate.row("a")
    assert row[:6] == ["a", "ready", "10GiB", "declared", "gpu0", "0"]
    assert row[7] != "-", "the load time was learned"
    model = tidegate.model("a")
    assert (model["state"], model["loads"], model["instances"][0]["state"]) == ("ready", 1, "ready")
    assert tidegate.json("models", "load", "a")["state"] == "ready", "it runs already"
    assert "a is unloaded: its server ends" in tidegate("models", "unload", "a")
    assert wait_for(lambda: tidegate.model("a")["state"] == "stopped", "it is gone")
    assert tidegate("models", "unload", "a") == "a has no server\n"


def test_a_load_that_fails_says_why_and_exits_with_1(shared: Gateway) -> None:
    """What the server printed, what it needs and what there is, whose it is: never just "failed"."""
    tidegate = Command(shared)
    assert "no weights here" in tidegate("models", "load", "broken", status=1)
    assert "no weights here" in " ".join(tidegate.row("broken"))
    said = tidegate("models", "load", "giant", status=1)
    assert "30" in said
    assert "24" in said
    assert "elsewhere runs elsewhere" in tidegate("models", "load", "elsewhere", status=1)
    for command in (["models", "load"], ["models", "pin"], ["explain"], ["logs"], ["logs", "-f"]):
        assert "there is no model 'nobody'" in tidegate(*command, "nobody", status=1)


def test_a_load_says_what_happens_and_goes_on_after_ctrl_c(shared: Gateway) -> None:
    """It tells that the server starts; Ctrl-C ends the command alone; `--no-wait` doesn't wait at all."""
    tidegate = Command(shared)
    with tidegate.running("models", "load", "slow") as load:
        assert wait_for(lambda: load.says("starting on gpu0"), "it says what happens", 60)
        assert load.interrupt() == 1
    assert load.says("the load of slow goes on")
    assert load.out == []
    assert tidegate.model("slow")["state"] in ("loading", "ready")
    assert "its load is ordered" in tidegate("models", "load", "slow", "--no-wait")
    assert tidegate("models", "load", "slow").startswith("slow is ready")
    assert tidegate.model("slow")["loads"] == 1, "one start for all of them"


def test_a_pinned_model_is_not_evicted(shared: Gateway) -> None:
    """`pin` shows in the list and in the explanation of who else can't be had; `unpin` takes it back."""
    tidegate = Command(shared)
    tidegate("models", "load", "a")
    before = tidegate("explain", "b")
    assert "drain and stop" in before
    assert "gpu0 has" in before
    assert "a is pinned" in tidegate("models", "pin", "a")
    assert "yes" in tidegate.row("a")
    pinned = tidegate.json("explain", "b")
    assert not pinned["actions"]
    assert pinned["problem"]
    assert "b can't be had" in tidegate("explain", "b")
    assert "b can't be loaded: needs 20 GiB" in tidegate("models", "load", "b", status=1)
    assert "not pinned any more" in tidegate("models", "unpin", "a")
    tidegate("models", "load", "b")
    assert tidegate.model("a")["state"] != "ready"
    assert "nothing would have to be done" in tidegate("explain", "b")


def test_events_and_logs_are_shown(shared: Gateway) -> None:
    """The last ones, of one model or all, as a table and as JSON; a model's output without its server."""
    tidegate = Command(shared)
    tidegate("models", "load", "a")
    events = [json.loads(line) for line in tidegate("events", "--model", "a", "--json").splitlines()]
    assert {"starting", "ready"} <= {event["kind"] for event in events}
    assert {event["model"] for event in events} == {"a"}
    assert len(tidegate("events", "--last", "2").splitlines()) == 2
    assert "ready" in tidegate("events", "--last", "50")
    lines = tidegate("logs", "a", "-n", "2").splitlines()
    assert len(lines) == 2
    assert [
        json.loads(line)["line"] for line in tidegate("logs", "a", "-n", "2", "--json").splitlines()
    ] == lines
    tidegate("models", "load", "broken", status=1)
    assert "no weights here" in tidegate("logs", "broken"), "its server has ended, its log stays"
    for wrong in (["events", "--last", "1001"], ["logs", "a", "-n", "0"], ["logs", "a", "-n", "x"]):
        assert "is not allowed; give" in tidegate(*wrong, status=2)
    assert "runs elsewhere" in tidegate("logs", "elsewhere", status=1)


def test_following_survives_a_restart_of_lifecycle(gateway: Make) -> None:
    """`-f` says that the service has gone and is back, then goes on; nothing is shown twice."""
    one = gateway({"a": simulated("--access-log")}).start()
    tidegate = Command(one)
    tidegate("models", "load", "a")
    with (
        tidegate.running("events", "-f", "--last", "1000") as events,
        tidegate.running("logs", "a", "-f", "-n", "1000") as logs,
    ):
        assert wait_for(lambda: events.says("ready"), "the events that there were", 60)
        assert wait_for(lambda: logs.out, "the lines that there were", 60)
        one.kill("lifecycle")
        for follower in (events, logs):
            assert wait_for(partial(follower.says, "lifecycle has gone"), "it says so", 60)
            assert wait_for(partial(follower.says, "lifecycle is back"), "and that it is back", 60)
        assert wait_for(lambda: events.says("adopted"), "what happened meanwhile", 60)
        before = sum("/v1/chat/completions" in line for line in logs.out)
        wait_for(one.is_ready, "it serves again", 60)
        assert one.chat("a").status_code == 200
        assert wait_for(
            lambda: sum("/v1/chat" in line for line in logs.out) == before + 1, "the new line", 60
        )
        whole = tidegate("logs", "a", "-n", "1000").splitlines(keepends=True)
        tidegate("models", "unload", "a")
        assert wait_for(lambda: events.says("gone"), "it goes on", 60)
        assert logs.interrupt() == events.interrupt() == 0
    assert logs.out[: len(whole)] == whole, "no line twice, none left out"
    assert sum(" ready " in line for line in events.out) == 1


def test_where_a_log_goes_on_is_found_again() -> None:
    """After a break the lines are told that weren't; with another log all are."""
    assert unseen(["1", "2", "3"], ["2", "3", "4"]) == ["4"]
    assert unseen(["2", "3"], ["1", "2", "3", "4", "5"]) == ["4", "5"]
    assert unseen(["1", "2"], ["2"]) == []
    assert unseen(["1", "2"], ["7", "8"]) == ["7", "8"]
    assert unseen([], ["1"]) == ["1"]
    assert unseen(["1"], []) == []


def test_a_download_is_a_phase_of_a_load() -> None:
    """What is there and how fast it comes, as far as that is known; once it is over the server starts."""
    model = pb.ModelStatus(model="a", state=pb.MODEL_STATE_LOADING, load_time_ms=12_000)
    starting = pb.InstanceStatus(model="a", state=pb.INSTANCE_STATE_STARTING, device_ids=["gpu0", "gpu1"])
    assert phase(model, [starting]) == "starting on gpu0, gpu1, usually 12s"
    model.download.CopyFrom(pb.Download(done_bytes=3 << 30, total_bytes=15 << 30, bytes_per_second=41 << 20))
    assert phase(model, [starting]) == "downloading, 3GiB of 15GiB there, 41MiB/s"
    model.download.CopyFrom(pb.Download(done_bytes=5 << 20))
    assert phase(model, [starting]) == "downloading, 5MiB there"


def test_lifecycle_that_is_away_is_told(tmp_path: Path) -> None:
    """1 with what to do about it, followed or not."""
    nowhere = f"127.0.0.1:{free_port()}"
    for command in (["models", "list"], ["events", "-f"], ["logs", "a", "-f"], ["models", "load", "a"]):
        done = subprocess.run(
            [BIN / "tidegate", *command, "--address", nowhere], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, f"lifecycle can't be reached at {nowhere}" in done.stderr) == (1, True)
