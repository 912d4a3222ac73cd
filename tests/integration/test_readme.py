"""What the README tells a new user to do works as written (on another port)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.gateway import BIN, free_port, wait_for

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def _block(language: str, word: str) -> str:
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if word in block)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[str]:
    """What `make run` starts, on a free port and with a folder of its own; its host:port."""
    listen = f"127.0.0.1:{free_port()}"
    environ = os.environ | {
        "TIDEGATE_EDGE__LISTEN": listen,
        "TIDEGATE_EDGE__KEYS_FILE": str(tmp_path / "keys.json"),
        "TIDEGATE_LIFECYCLE__DATA_DIR": str(tmp_path / "data"),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [BIN / "tidegate", "serve", "--config", "deploy/demo.yaml"],
            cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: "ready on" in (tmp_path / "log").read_text(), "the demo is ready", 60)
        yield listen
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(12) == 0


def test_the_examples_of_the_readme(demo: str) -> None:
    """The curl and openai-python examples answer, and the second model makes the first one go."""
    curl = _block("sh", "curl").replace("127.0.0.1:8080", demo)
    done = subprocess.run(["bash", "-ec", curl], capture_output=True, text=True, timeout=60, check=True)
    assert "data: [DONE]" in done.stdout
    code = _block("python", "openai").replace("127.0.0.1:8080", demo)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert len(done.stdout) > 10
    status = httpx.get(f"http://{demo}/gateway/status", trust_env=False).json()
    running = {instance["model"] for instance in status["instances"] if instance["state"] == "ready"}
    assert running == {"large"}


def test_the_commands_of_the_readme(demo: str, tmp_path: Path) -> None:
    """Each command for operators is carried out on the demo; those that go on begin to."""
    lines = [line.partition("  #")[0] for line in _block("sh", "tidegate models").splitlines()]
    assert len(lines) == 12
    for line in lines:
        words = line.replace("tidegate.yaml", "deploy/demo.yaml").replace("MODEL", "small").split()[1:]
        goes_on = bool({"-f", "--watch"} & set(words))
        with subprocess.Popen(
            [BIN / "tidegate", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ) as command:
            assert command.stdout is not None
            assert command.stderr is not None
            if goes_on:
                assert command.stdout.readline(), line
                command.send_signal(signal.SIGINT)
            status = command.wait(30)
            said = command.stderr.read()
        assert (status == 0) != ("LEASE" in words), (line, said)
        assert "Traceback" not in said
    _keys(demo, tmp_path / "keys.json")


def _keys(demo: str, path: Path) -> None:
    """The first key closes the demo; it is valid until it is revoked."""
    script = (
        _block("sh", "keys create")
        .replace("127.0.0.1:8080", demo)
        .replace("tidegate.yaml", "deploy/demo.yaml")
    )
    make, revoke = (
        script[: script.index("tidegate keys revoke")],
        script[script.index("tidegate keys revoke") :],
    )
    environ = os.environ | {"TIDEGATE_EDGE__KEYS_FILE": str(path), "PATH": f"{BIN}:{os.environ['PATH']}"}

    def run(text: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", text],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env=environ,
            check=True,
        )
        return done.stdout

    def status() -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.get(f"http://{demo}/v1/models", headers=headers, trust_env=False).status_code

    said = run(make + '\necho "KEY=$KEY"')
    key = said.rsplit("KEY=", 1)[1].strip()
    assert '"object":"list"' in said
    first = json.loads(path.read_text())["keys"][0]
    assert first["tenant"] == "team-a"
    assert status() == 200
    run(revoke.replace(" ID ", f" {first['id']} "))
    wait_for(lambda: status() == 401, "the key is refused")


def test_the_readmes_configuration_is_valid(tmp_path: Path) -> None:
    """The example with real model servers passes `tidegate config check`."""
    path = tmp_path / "tidegate.yaml"
    path.write_text(_block("yaml", "engine: vllm"))
    done = subprocess.run(
        [BIN / "tidegate", "config", "check", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
