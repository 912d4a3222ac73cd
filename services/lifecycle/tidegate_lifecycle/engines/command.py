"""Any OpenAI-compatible server, by its command line."""

from __future__ import annotations

import re

from tidegate_lifecycle.catalog import Model, digest
from tidegate_lifecycle.engines import flags
from tidegate_lifecycle.engines.base import READY_TIMEOUT, Command, Placement, in_image, visible_devices
from tidegate_lifecycle.probes import Health, Probe

_PLACEHOLDER = re.compile(r"\{(port|name|devices)\}")


class CommandEngine:
    """Puts {port}, {name} and {devices} into the model's own command; other braces are left alone."""

    name = "command"
    flags = flags.NONE
    stop_grace = 10.0

    def command(self, model: Model, placement: Placement) -> Command:
        """The command as given, filled in, followed by `extra_args`. {devices} are ids, with commas.

        In a container it is the whole command: the image's own entrypoint isn't used.
        """
        values = {
            "port": str(placement.port),
            "name": model.served_name,
            "devices": ",".join(device.id for device in placement.devices),
        }
        given = (*model.command, *model.extra_args)
        argv = tuple(_PLACEHOLDER.sub(lambda found: values[found[1]], argument) for argument in given)
        return Command(argv, visible_devices(model, placement))

    def signature(self, model: Model) -> str:
        """The command, its environment, and the name that it is told."""
        shape = [self.name, *model.command, *model.extra_args]
        return digest({"argv": shape, "env": dict(model.env), "name": model.served_name, **in_image(model)})

    def default_slots(self, model: Model) -> int | None:
        """Nothing is known of it."""
        return None

    async def ready(self, probe: Probe, model: Model, address: str) -> Health:
        """Its health route answers."""
        return await probe.get(address, model.health_path, READY_TIMEOUT)
