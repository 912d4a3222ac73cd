"""Section `lifecycle`, and the whole of this service's configuration, checked together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tidegate_chassis.config import (
    Document,
    Problem,
    Settings,
    TelemetrySettings,
    check,
    read,
    require,
)
from tidegate_chassis.kinds import Address, Choice, Duration, Number, Size, Text
from tidegate_chassis.tls import TlsFiles, check_section
from tidegate_lifecycle.catalog import Catalog, DeviceSpec, Model
from tidegate_lifecycle.docker_settings import DockerSettings
from tidegate_lifecycle.footprints.settings import FootprintSettings
from tidegate_lifecycle.kinds import MIB, Identifier, Maybe, Vram
from tidegate_lifecycle.model_settings import (
    NAME,
    NAME_WORDS,
    TEXT,
    ModelSettings,
    check_engine,
    check_names,
    read_models,
)
from tidegate_lifecycle.reload import TAKEN_OVER
from tidegate_lifecycle.world import Policy


class DeviceSettings(Settings):
    """One entry of `lifecycle.devices`."""

    id: Annotated[str, Identifier()] = Field(
        ...,
        description="Its name. Without `memory`: the index or UUID of a card that nvidia-smi shows, or of a "
        "MIG instance (0:1, MIG-...). With it: any; with a UUID servers are started on that card.",
    )
    memory: Annotated[int | None, Maybe(Size("1MiB", "10TiB"))] = Field(
        None, description="Total memory, declared; empty = read from the driver."
    )
    pool: Annotated[str, Text(NAME, NAME_WORDS)] = Field(
        "default", description="Models are placed in their own pool alone."
    )
    budget: Annotated[float, Number(0.01, 1)] = Field(
        0.92, description="Share of the total that model servers may use."
    )


class LifecycleSettings(Settings):
    """Section `lifecycle`."""

    listen: Annotated[str, Address()] = Field(
        "127.0.0.1:7072", description="Where the service listens: host:port or unix:/path."
    )
    data_dir: Annotated[str, Text(r"[^\x00-\x1f]+", "a path")] = Field(
        "./tidegate-data", description="Folder of its database, records and logs; for this service alone."
    )
    runtime: Annotated[str, Choice("process", "docker")] = Field(
        "process", description="What runs model servers: process or docker."
    )
    devices: list[DeviceSettings] | None = Field(
        None, description="Cards that may be used; left out = all that nvidia-smi shows."
    )
    idle_timeout: Annotated[float, Duration("100ms", "365d", zero="never")] = Field(
        1800.0, description="A model without use is stopped so long after its last release; 0 = never."
    )
    min_residency: Annotated[float, Duration("0s", "1d")] = Field(
        30.0,
        description="A model with demand isn't drained for another one so soon after it became ready; "
        "2 × its load time if that is more.",
    )
    max_swap_wait: Annotated[float, Duration("0s", "1d")] = Field(
        60.0, description="How long a wanted model waits at most before the resident one must begin to drain."
    )
    drain_timeout: Annotated[float, Duration("100ms", "1d", zero="never cut")] = Field(
        300.0,
        description="How long a draining model may go on; then what still runs is ended; 0 = never cut.",
    )
    on_stop: Annotated[str, Choice("stop", "leave")] = Field(
        "stop",
        description="What becomes of model servers when the service ends: stop, or leave for adoption.",
    )
    hf_cache: Annotated[str, TEXT] = Field(
        "~/.cache/huggingface",
        description="The hub's cache: models are downloaded into it, and containers of engines vllm and "
        "llamacpp have it mounted; empty = none. Left out, processes use the environment's (HF_HOME).",
    )
    docker: DockerSettings = Field(DockerSettings(), description="The docker runtime.")
    footprints: FootprintSettings = Field(
        FootprintSettings(), description="How what servers really take is measured."
    )
    metrics_listen: Annotated[str, Address(unix=False, optional=True)] = Field(
        "", description="Where /metrics is served, host:port; empty = nowhere."
    )


@dataclass(frozen=True)
class Loaded:
    """The configuration as this service uses it."""

    document: Document
    lifecycle: LifecycleSettings
    telemetry: TelemetrySettings
    catalog: Catalog
    devices: tuple[DeviceSpec, ...]
    """As declared; empty = all that the driver shows."""
    folder: Path
    """The file's folder: where model servers work, and what relative paths are relative to."""
    data_dir: Path
    """The folder of the database, the records and the logs."""
    hub_cache: Path | None
    """The hub's cache, for containers; None = it isn't mounted."""
    entries: dict[str, ModelSettings]
    """The models as the file has them, `defaults` merged in."""
    tls: TlsFiles | None
    """For gRPC; None = it is plain."""

    @property
    def needs_devices(self) -> bool:
        """Some model runs here, so that there must be a device."""
        return any(not model.external for model in self.catalog.models.values())


def reload(path: str | Path, running: Loaded) -> tuple[Loaded | None, list[Problem]]:
    """The file as it is by now, for a service that runs by an older form of it; never raises. None = it can't
    be used, and why.

    Models are what they are under the settings of the running service, but for those that are taken over:
    what needs a restart mustn't change them before. An empty file is most likely half-written, and refused.
    """
    document = read(path)
    if document.blank and not document.problems:
        document.problems.append(Problem("", f"{path} is empty"))
    loaded, found = _check(document)
    if loaded is None:
        return None, found
    docker = running.lifecycle.docker.model_copy(update={"image": loaded.lifecycle.docker.image})
    taken = {key: getattr(loaded.lifecycle, key) for key in TAKEN_OVER}
    lifecycle = running.lifecycle.model_copy(update={**taken, "docker": docker})
    models = {name: to_model(name, entry, lifecycle) for name, entry in loaded.entries.items()}
    return replace(loaded, catalog=Catalog(models)), found


def load(path: str | Path) -> Loaded:
    """Reads and checks the file; ConfigError with all problems at once."""
    loaded, found = _check(read(path))
    require(found)
    assert loaded is not None
    return loaded


def policy(lifecycle: LifecycleSettings) -> Policy:
    """The times of the section, as the planner uses them."""
    return Policy(lifecycle.min_residency, lifecycle.max_swap_wait, lifecycle.drain_timeout)


def problems(path: str | Path) -> list[Problem]:
    """Everything that is wrong or odd about this service's sections; never raises."""
    return sorted(set(_check(read(path))[1]))


def _check(document: Document) -> tuple[Loaded | None, list[Problem]]:
    found = list(document.problems)
    lifecycle = check(LifecycleSettings, document.section("lifecycle"), "lifecycle", found)
    telemetry = check(TelemetrySettings, document.section("telemetry"), "telemetry", found)
    files = None
    if lifecycle is not None:
        _check_devices(lifecycle, found)
        files = check_section(document, "lifecycle.listen", lifecycle.listen, found)
    entries = read_models(document, found)
    check_names(entries, found)
    for name, entry in entries.items():
        check_engine(f"models.{name}", name, entry, found)
    if lifecycle is not None:
        _check_pools(lifecycle, entries, found)
        for name, entry in entries.items():
            _check_runtime(f"models.{name}", lifecycle, entry, found)
    if lifecycle is None or telemetry is None or any(not problem.warning for problem in found):
        return None, found
    models = {name: to_model(name, entry, lifecycle) for name, entry in entries.items()}
    specs = tuple(
        DeviceSpec(item.id, None if item.memory is None else item.memory // MIB, item.pool, item.budget)
        for item in lifecycle.devices or ()
    )
    folders = document.path.resolve().parent, document.resolve(lifecycle.data_dir)
    hub_cache = document.resolve(lifecycle.hf_cache) if lifecycle.hf_cache else None
    catalog = Catalog(models)
    return Loaded(document, lifecycle, telemetry, catalog, specs, *folders, hub_cache, entries, files), found


def _check_devices(lifecycle: LifecycleSettings, found: list[Problem]) -> None:
    devices = lifecycle.devices
    if devices is None:
        return
    if not devices:
        found.append(
            Problem("lifecycle.devices", "[] is not allowed; give at least one, or leave the key out")
        )
    seen: set[str] = set()
    for index, device in enumerate(devices):
        if device.id in seen:
            found.append(Problem(f"lifecycle.devices.{index}.id", f"{device.id!r} is given twice"))
        seen.add(device.id)


def _check_pools(
    lifecycle: LifecycleSettings, entries: dict[str, ModelSettings], found: list[Problem]
) -> None:
    pools = {device.pool for device in lifecycle.devices} if lifecycle.devices else {"default"}
    for name, entry in entries.items():
        if entry.engine != "external" and entry.pool not in pools:
            text = f"{entry.pool!r} is no pool of lifecycle.devices; there are {', '.join(sorted(pools))}"
            found.append(Problem(f"models.{name}.pool", text))


def _check_runtime(
    path: str, lifecycle: LifecycleSettings, entry: ModelSettings, found: list[Problem]
) -> None:
    if lifecycle.runtime == "process" or entry.engine == "external":
        for key in ("image", "volumes"):
            if getattr(entry, key):
                text = "has a function with lifecycle.runtime: docker alone, for models that run here"
                found.append(Problem(f"{path}.{key}", text, warning=True))
        return
    if entry.engine != "vllm" and not entry.image and lifecycle.docker.image.startswith("vllm/"):
        text = f"is not given: {lifecycle.docker.image} must hold what the engine {entry.engine} runs"
        found.append(Problem(f"{path}.image", text, warning=True))
    if entry.source and entry.source.startswith(("~", ".")):
        text = f"{entry.source!r} is no path in a container; mount it with `volumes`, and give that path"
        found.append(Problem(f"{path}.source", text))


def to_model(name: str, entry: ModelSettings, lifecycle: LifecycleSettings) -> Model:
    """The catalogue's form of an entry."""
    vram = entry.vram or Vram()
    contained = lifecycle.runtime == "docker" and entry.engine != "external"
    image = (entry.image or lifecycle.docker.image) if contained else ""
    idle = lifecycle.idle_timeout if entry.idle_timeout is None else entry.idle_timeout
    return Model(
        name=name,
        engine=entry.engine,
        aliases=entry.aliases,
        upstream_model=entry.upstream_model or "",
        request_defaults=entry.request_defaults,
        pool=entry.pool,
        vram_mib=vram.mib,
        vram_share=vram.share,
        tensor_parallel_size=entry.tensor_parallel_size,
        max_concurrent=entry.max_concurrent,
        max_queue=entry.max_queue,
        idle_timeout=idle,
        always_on=entry.always_on,
        instances=entry.instances,
        start_timeout=entry.start_timeout,
        health_path=entry.health_path,
        env=entry.env,
        command=entry.command,
        source=entry.source or "",
        executable=entry.executable or "",
        max_model_len=entry.max_model_len,
        max_num_seqs=entry.max_num_seqs,
        kv_reservation_seqs=entry.kv_reservation_seqs,
        kv_cache_dtype=entry.kv_cache_dtype or "",
        quantization=entry.quantization or "",
        dtype=entry.dtype,
        tokenizer=entry.tokenizer or "",
        extra_args=entry.extra_args,
        image=image,
        volumes=entry.volumes if image else (),
        urls=entry.urls,
    )
