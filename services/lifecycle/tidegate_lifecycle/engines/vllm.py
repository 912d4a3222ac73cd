"""vLLM, from a local executable or an image."""

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
from tidegate_lifecycle.probes import Health, Probe

_GPU_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")


class VllmEngine:
    """`vllm serve`, bound to the share of each card that was reserved for it.

    The share is a hard limit of vLLM itself, over weights, activations, graphs and KV cache together: so a
    reservation that is too small fails this start and can't hurt a neighbour.

    `--shutdown-timeout` isn't set, and is no extra argument either: SIGTERM comes after the drain, when
    nothing runs there or what runs is to end, and its default of 0 ends that at once, well within
    `stop_grace`. Older releases don't know the flag; with a longer time a server would be killed meanwhile.
    """

    name = "vllm"
    flags = flags.VLLM
    stop_grace = 10.0

    def __init__(self, environ: Mapping[str, str] = os.environ, gpu: bool | None = None) -> None:
        self._environ = environ
        self._gpu = any(map(os.path.exists, _GPU_NODES)) if gpu is None else gpu

    def command(self, model: Model, placement: Placement) -> Command:
        """It serves the upstream name, which the edge says; name and aliases too, to whoever asks itself."""
        local = model.source.startswith("~") and not model.image
        source = placement.files.model or (os.path.expanduser(model.source) if local else model.source)
        argv = [model.executable or "vllm", "serve", source]
        argv += ["--host", placement.host, "--port", str(placement.port)]
        argv += ["--served-model-name", *_names(model)]
        # Of declared cards too, or vLLM would take nearly all of whatever card it finds. But where there is
        # none it means a share of the host's memory, which sizes declared for a rehearsal don't describe.
        real = self._gpu or any(device.visible_as for device in placement.devices)
        if real and (share := _share(placement)):
            argv += ["--gpu-memory-utilization", share]
        if len(placement.devices) > 1:
            argv += ["--tensor-parallel-size", str(len(placement.devices))]
        argv += _options(model)
        cache = {"HF_HUB_CACHE": placement.files.hub_cache} if placement.files.hub_cache else {}
        return Command(
            (*argv, *model.extra_args),
            {**hub_environment(self._environ), **cache, **visible_devices(model, placement)},
            hub=True,
        )

    def signature(self, model: Model) -> str:
        """All that reaches the command line or its environment, where and how large aside; aliases too, which
        the edge translates."""
        memory = [model.vram_mib, model.vram_share, model.tensor_parallel_size]
        memory += [] if model.kv_reservation_seqs is None else [model.kv_reservation_seqs]
        argv = [model.executable or "vllm", model.source, *_options(model), *model.extra_args]
        shape = {"engine": self.name, "argv": argv, "name": model.served_name, "memory": memory}
        return digest({**shape, "env": dict(model.env), **in_image(model)})

    def default_slots(self, model: Model) -> int | None:
        """Two more than it runs at once: the next ones are at hand when a sequence ends."""
        return None if model.max_num_seqs is None else model.max_num_seqs + 2

    async def ready(self, probe: Probe, model: Model, address: str) -> Health:
        """Healthy, and it lists the name: a stranger that took the port doesn't."""
        health = await probe.get(address, model.health_path, READY_TIMEOUT)
        if not health.ok:
            return health
        names = await probe.models(address, READY_TIMEOUT)
        if names is None:
            return Health(False, "it doesn't list its models")
        return Health(True) if model.name in names else Health(False, "it doesn't list this model")


def _names(model: Model) -> list[str]:
    return list(dict.fromkeys((model.name, *model.aliases, model.served_name)))


def _options(model: Model) -> list[str]:
    options = (
        ("--max-model-len", model.max_model_len),
        ("--max-num-seqs", model.seqs_at_once),
        ("--dtype", "" if model.dtype == "auto" else model.dtype),
        ("--quantization", model.quantization),
        ("--kv-cache-dtype", model.kv_cache_dtype),
        ("--tokenizer", model.tokenizer),
    )
    return [text for flag, value in options if value for text in (flag, str(value))]


def _share(placement: Placement) -> str:
    """What was reserved, as a share of the smallest card, rounded down; empty when either is unknown."""
    totals = [device.total_mib for device in placement.devices if device.total_mib > 0]
    if not totals or placement.reserved_mib <= 0:
        return ""
    ten_thousandths = placement.reserved_mib * 10_000 // min(totals)
    return f"{min(max(ten_thousandths, 1), 10_000) / 10_000:.4f}"
