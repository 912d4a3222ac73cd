"""llama.cpp's server, for GGUF files."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tidegate_lifecycle.catalog import Model, digest
from tidegate_lifecycle.engines import flags
from tidegate_lifecycle.engines.base import (
    READY_TIMEOUT,
    Command,
    Placement,
    hub_environment,
    in_image,
    visible_devices,
)
from tidegate_lifecycle.hub.source import InRepo, Local, Url, parse
from tidegate_lifecycle.probes import Health, Probe


class LlamaCppEngine:
    """`llama-server`. Its context is shared by all slots, so it gets `max_model_len` for each of them."""

    name = "llamacpp"
    flags = flags.LLAMA_CPP
    stop_grace = 10.0

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ

    def command(self, model: Model, placement: Placement) -> Command:
        """All layers go to the card when there is a real one; on declared ones llama.cpp decides.

        In a container without `executable` the image's own entrypoint is the server: images have it at
        places that no PATH names.
        """
        image_entrypoint = bool(model.image) and not model.executable
        program = [] if image_entrypoint else [model.executable or "llama-server"]
        argv = [*program, *_model(model, placement)]
        argv += ["--host", placement.host, "--port", str(placement.port), "--alias", model.served_name]
        argv += [*_options(model), "--metrics"]
        if placement.devices and all(device.visible_as for device in placement.devices):
            argv += ["-ngl", "999"]  # before extra_args: the last one wins, so users can say otherwise
        return Command(
            (*argv, *model.extra_args),
            {**hub_environment(self._environ), **visible_devices(model, placement)},
            hub=True,
            image_entrypoint=image_entrypoint,
        )

    def signature(self, model: Model) -> str:
        """All that reaches the command line or its environment, where it runs aside."""
        argv = [model.executable or "llama-server", model.source, *_options(model), *model.extra_args]
        shape = {"engine": self.name, "argv": argv, "name": model.served_name, "env": dict(model.env)}
        return digest({**shape, **in_image(model)})

    def default_slots(self, model: Model) -> int | None:
        """As many as it runs at once."""
        return model.max_num_seqs

    async def ready(self, probe: Probe, model: Model, address: str) -> Health:
        """Its health route answers; while it loads that is 503."""
        return await probe.get(address, model.health_path, READY_TIMEOUT)


def source(text: str) -> list[str]:
    """How llama-server is told where the model is, when it is to fetch it itself."""
    meant = parse(text)
    if isinstance(meant, Url):
        return ["--model-url", text]
    if isinstance(meant, Local):
        return ["-m", os.path.expanduser(text) if text.startswith("~") else text]
    if isinstance(meant, InRepo):
        return ["--hf-repo", meant.repo, "--hf-file", meant.path]
    return ["-hf", text]


def _model(model: Model, placement: Placement) -> list[str]:
    files = placement.files
    if not files.model:
        return source(model.source)
    return ["-m", files.model, *(["--mmproj", files.projector] if files.projector else [])]


def _options(model: Model) -> list[str]:
    slots = model.max_num_seqs or 1
    context = ["-c", str(model.max_model_len * slots)] if model.max_model_len else []
    cache = ["-ctk", model.kv_cache_dtype, "-ctv", model.kv_cache_dtype] if model.kv_cache_dtype else []
    return [*context, "-np", str(slots), *cache]
