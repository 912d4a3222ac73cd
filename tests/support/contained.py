"""A gateway whose model servers are containers of the simulator's image."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from tests.support import containers, simulator_image


class Fleet:
    """A gateway's containers, and the sections that make it use some."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = f"tidegate-test-{uuid.uuid4().hex[:8]}"
        self.lifecycle: dict[str, Any] = {
            "runtime": "docker",
            "hf_cache": str(folder / "hub"),
            "docker": {
                "image": simulator_image.image(),
                "network": self.network,
                "shm_size": "64MiB",
                "memory": "512MiB",
                "pull": "never",
            },
        }

    def listed(self, model: str = "") -> list[str]:
        """Ids of the containers in its network, of one model when it is given."""
        with containers.engine() as client:
            found = client.containers(all=True, filters={"network": self.network})
        return [one["Id"] for one in found if model in ("", one["Labels"]["tidegate.model"])]

    def clean(self) -> None:
        """Whatever a failed test left."""
        for one in self.listed():
            containers.remove(one)
        containers.remove_network(self.network)


def contained(*flags: str, **keys: Any) -> dict[str, Any]:
    """A model that the simulator's image serves, by its command."""
    command = ["tidegate-simulator", "--host", "0.0.0.0", "--port", "{port}", "--model", "{name}", *flags]
    return {"engine": "command", "command": command, "vram": "18GiB", **keys}
