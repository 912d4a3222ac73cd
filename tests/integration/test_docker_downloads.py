"""A model on a hub of our own, downloaded by lifecycle for a server in a container and its many callers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.contained import Fleet
from tests.support.gateway import Gateway
from tests.support.hub import Hub

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]  # the image may have to be built first

CONTENT = os.urandom(2_000_000)
SERVER = """#!/bin/sh
# Called as llama-server is: -m FILE --host HOST --port PORT ...
echo "$SHA256  $2" | sha256sum -c - || exit 1
exec tidegate-simulator --host 0.0.0.0 --port 8000 --model a
"""


def test_a_container_finds_what_was_downloaded_for_it(
    gateway: Callable[..., Gateway], fleet: Fleet, tmp_path: Path
) -> None:
    """Twenty callers of a cold model, a connection that is cut: one transfer, the right file, 20 answers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "llama-server").write_text(SERVER)
    (folder / "llama-server").chmod(0o755)
    model = {
        "engine": "llamacpp",
        "source": "org/m-GGUF:q8_0",
        "executable": "/opt/bin/llama-server",
        "volumes": [f"{folder}:/opt/bin:ro"],
        "env": {"SHA256": hashlib.sha256(CONTENT).hexdigest()},
        "vram": "18GiB",
        "max_concurrent": 32,
    }
    hub = Hub()
    hub.repos["org/m-GGUF"] = {"m-Q4_K_M.gguf": b"other", "m-Q8_0.gguf": CONTENT}
    hub.fault("m-Q8_0.gguf").cut = [700_000]
    with hub.running(), ThreadPoolExecutor(20) as callers:
        one = gateway({"a": model}, environ={"HF_ENDPOINT": hub.url}, lifecycle=fleet.lifecycle).start()
        statuses = [answer.status_code for answer in callers.map(one.chat, ["a"] * 20)]
        assert statuses == [200] * 20, one.log()
        assert hub.served["m-Q8_0.gguf"] == len(CONTENT)
        assert len(fleet.listed("a")) == 1
        one.stop()
