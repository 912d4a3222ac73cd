"""What operators type about devices while the gateway runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import BIN, Gateway, simulated, wait_for

TWO = [{"id": name, "memory": "24GiB", "budget": 1} for name in ("gpu0", "gpu1")]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """Two cards, one model that is always there."""
    models = {"on": simulated(vram="10GiB", always_on=True)}
    one = Gateway(tmp_path, {"models": models, "lifecycle": {"devices": TWO}}).start()
    yield one
    one.close()


def tidegate(one: Gateway, *arguments: str, status: int = 0) -> str:
    """What the command prints: on stdout when it is to succeed, on stderr when it is to fail."""
    command = [str(BIN / "tidegate"), *arguments, "--config", str(one.config_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, (arguments, done.stdout, done.stderr)
    return done.stderr if status else done.stdout


def listed(one: Gateway) -> dict[str, dict[str, Any]]:
    """Every device, as JSON has it."""
    return {device["device_id"]: device for device in json.loads(tidegate(one, "devices", "list", "--json"))}


def test_a_device_is_taken_back_and_given_back(gateway: Gateway) -> None:
    """The table shows who holds what; drain moves what must be somewhere; errors name what there is."""
    wait_for(lambda: listed(gateway)["gpu0"]["instances"], "the model is placed")
    header, first, second = tidegate(gateway, "devices", "list").splitlines()
    titles = ["DEVICE", "NAME", "POOL", "TOTAL", "BUDGET", "RESERVED", "OTHERS", "MODELS", "NOTE"]
    assert header.split() == titles
    assert first.split() == ["gpu0", "-", "default", "24GiB", "24GiB", "10GiB", "-", "on"]
    assert second.split() == ["gpu1", "-", "default", "24GiB", "24GiB", "0MiB", "-", "-"]

    said = tidegate(gateway, "devices", "drain", "gpu0")
    assert said == "gpu0 is taken back until `tidegate devices undrain gpu0`: its server ends\n"
    wait_for(lambda: not listed(gateway)["gpu0"]["instances"], "the device is empty")
    assert listed(gateway)["gpu1"]["instances"]
    assert listed(gateway)["gpu0"]["draining"] is True
    assert tidegate(gateway, "devices", "list").splitlines()[1].endswith("taken back by an operator")
    assert "nothing runs on it" in tidegate(gateway, "devices", "drain", "gpu0")

    assert tidegate(gateway, "devices", "undrain", "gpu0") == "gpu0 is in use again\n"
    assert listed(gateway)["gpu0"]["draining"] is False
    words = "tidegate: there is no device 'gpu9'; there are gpu0, gpu1\n"
    assert tidegate(gateway, "devices", "drain", "gpu9", status=1) == words
