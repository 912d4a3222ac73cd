"""compatcanary, a scanner of OpenAI-compatible servers, scores the gateway as the server behind it."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from scripts.clients import NODE, node
from tests.clients.conftest import Scene


def _scan(url: str, key: str) -> dict[str, Any]:
    program = NODE / "node_modules" / "compatcanary" / "src" / "cli.js"
    done = subprocess.run(
        [node(), program, "scan", "--base-url", f"{url}/v1", "--model", "chat", "--format", "json"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OPENAI_API_KEY": key},
    )
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0, report
    return report


def test_the_gateway_scores_as_the_server_behind_it(scene: Scene) -> None:
    """Both get every point, probe by probe."""
    relayed, direct = _scan(scene.gateway.url, scene.key), _scan(scene.behind().address, "none")
    assert relayed["score"] == direct["score"] == 100
    assert relayed["summary"] == direct["summary"]
    probes = [{result["id"]: result["status"] for result in one["results"]} for one in (relayed, direct)]
    assert probes[0] == probes[1]
    assert len(probes[0]) >= 7
