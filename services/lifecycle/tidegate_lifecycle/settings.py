"""Sections `lifecycle`, `defaults` and `models`: every key, its range, and how to say so."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

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
from tidegate_chassis.kinds import Address, Choice, Duration, Flag, Number, Size, Text, Whole
from tidegate_lifecycle.catalog import Catalog, DeviceSpec, Model
from tidegate_lifecycle.docker_settings import IMAGE, VOLUME, DockerSettings
from tidegate_lifecycle.engines import ENGINES
from tidegate_lifecycle.footprints.settings import FootprintSettings
from tidegate_lifecycle.hub.source import is_gguf, parse
from tidegate_lifecycle.kinds import MIB, Identifier, JsonObject, ListOf, Mapped, Maybe, Vram, VramKind
from tidegate_lifecycle.reload import TAKEN_OVER
from tidegate_lifecycle.world import Policy

_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}"
_NAME_WORDS = "1 to 128 letters, digits and . _ : / @ + -, beginning with a letter or digit"
_PLACEHOLDERS = {"port", "name", "devices"}
_TEXT = Text(r"[^\x00-\x1f]*", "a text without control characters")


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
    pool: Annotated[str, Text(_NAME, _NAME_WORDS)] = Field(
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
    hf_cache: Annotated[str, _TEXT] = Field(
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


class ModelSettings(Settings):
    """One entry of `models`; the same keys, none required, make up `defaults`."""

    engine: Annotated[str, Choice("command", "vllm", "llamacpp", "external")] = Field(
        "command", description="How its server is run: command, vllm, llamacpp or external."
    )
    command: Annotated[tuple[str, ...], ListOf(Text(r"[^\x00]*", "a text"))] = Field(
        (), description="Engine command: the argument vector, with {port}, {name} and {devices}; no shell."
    )
    aliases: Annotated[tuple[str, ...], ListOf(Text(_NAME, _NAME_WORDS))] = Field(
        (), description="Other names for it."
    )
    upstream_model: Annotated[str | None, Maybe(_TEXT)] = Field(
        None, description="The name that the server knows; empty = the model's own name."
    )
    env: Annotated[
        dict[str, str],
        Mapped(r"[A-Za-z_][A-Za-z0-9_]*", 'names of variables, each with a text (numbers in quotes: "1")'),
    ] = Field({}, description="Environment variables of its server.")
    vram: Annotated[Vram | None, Maybe(VramKind())] = Field(
        None,
        description="Memory per card, such as 10GiB or 90%; empty = estimated from the model's files with "
        "engines vllm and llamacpp, then measured; a whole card while neither is possible.",
    )
    pool: Annotated[str, Text(_NAME, _NAME_WORDS)] = Field(
        "default", description="The pool of devices that it is placed in."
    )
    health_path: Annotated[str, Text(r"/[!-~]*", "a path such as /health")] = Field(
        "/health", description="Answers with 2xx when the server is ready."
    )
    start_timeout: Annotated[float, Duration("1s", "1d")] = Field(
        600.0,
        description="How long a first start may take, downloads and image pulls not counted; later ones may "
        "take three times as long as its loads did, and a minute more. Never less than 6s for each GiB "
        "reserved; more after starts that weren't ready in time.",
    )
    max_concurrent: Annotated[int | None, Maybe(Whole(1, 1000))] = Field(
        None,
        description="Requests in flight per instance; empty = admission.max_concurrent, or max_num_seqs + 2 "
        "with vllm.",
    )
    max_queue: Annotated[int | None, Maybe(Whole(1, 10000))] = Field(
        None, description="Requests that may wait; empty = admission.max_queue."
    )
    idle_timeout: Annotated[float | None, Maybe(Duration("100ms", "365d", zero="never"))] = Field(
        None, description="As lifecycle.idle_timeout, which is used when empty; 0 = never."
    )
    always_on: Annotated[bool, Flag()] = Field(
        False, description="Started with the service, never stopped when idle, never evicted."
    )
    instances: Annotated[int, Whole(1, 64)] = Field(1, description="At most so many servers of it.")
    request_defaults: Annotated[dict[str, Any], JsonObject()] = Field(
        {}, description="Merged under the fields of each request."
    )
    source: Annotated[
        str | None, Maybe(Text(r"[^\x00-\x20-][^\x00-\x1f]*", "a hub name, a folder, a file or a URL"))
    ] = Field(
        None,
        description="Engines vllm and llamacpp: org/repo, a folder, or GGUF as a file, a URL, "
        "org/repo/file.gguf, org/repo-GGUF or org/repo:QUANT.",
    )
    executable: Annotated[str | None, Maybe(Text(r"[^\x00-\x1f]+", "a program's name or path"))] = Field(
        None, description="The program of engines vllm and llamacpp; empty = vllm, llama-server."
    )
    image: Annotated[str | None, Maybe(IMAGE)] = Field(
        None, description="Docker runtime: its image; empty = lifecycle.docker.image."
    )
    max_model_len: Annotated[int | None, Maybe(Whole(1, 100_000_000))] = Field(
        None, description="Context length in tokens; empty = the model's own."
    )
    max_num_seqs: Annotated[int | None, Maybe(Whole(1, 65536))] = Field(
        None,
        description="Sequences that the server works on at once; empty = 256 with vllm, or max_concurrent if "
        "that is more, and 1 with llamacpp.",
    )
    kv_reservation_seqs: Annotated[int | None, Maybe(Whole(1, 65536))] = Field(
        None,
        description="Engine vllm: sequences of max_model_len whose KV cache is reserved; few do for many "
        "short requests. Empty = max_num_seqs, or as many as hold 32,768 tokens when that is empty too. "
        "They shrink to one before the model is refused.",
    )
    kv_cache_dtype: Annotated[str | None, Maybe(Text(r"[A-Za-z0-9_]+", "a word such as fp8 or q8_0"))] = (
        Field(
            None, description="Engines vllm and llamacpp: type of the KV cache; empty = the server's default."
        )
    )
    tensor_parallel_size: Annotated[int | None, Maybe(Whole(1, 64))] = Field(
        None, description="How many equal cards it is spread over; empty = the fewest on which it fits."
    )
    quantization: Annotated[str | None, Maybe(Text(r"[A-Za-z0-9_.-]+", "a word"))] = Field(
        None, description="Engine vllm: --quantization."
    )
    dtype: Annotated[str, Text(r"[A-Za-z0-9_]+", "a word such as auto or bfloat16")] = Field(
        "auto", description="Engine vllm: --dtype."
    )
    tokenizer: Annotated[str | None, Maybe(Text(r"[^\x00-\x20-][^\x00-\x1f]*", "a hub name or a folder"))] = (
        Field(None, description="Engine vllm: --tokenizer; with GGUF the repository of the original model.")
    )
    volumes: Annotated[tuple[str, ...], ListOf(VOLUME)] = Field(
        (), description="Docker runtime: folders or named volumes for its container, SOURCE:TARGET[:ro|rw]."
    )
    extra_args: Annotated[tuple[str, ...], ListOf(Text(r"[^\x00]*", "a text"))] = Field(
        (), description="More arguments for engines vllm and llamacpp; none that the service owns."
    )
    urls: Annotated[
        tuple[str, ...],
        ListOf(Text(r"https?://[^\s/?#@]+(/[^\s?#]*)?", "a URL such as http://10.0.0.5:8000")),
    ] = Field((), description="Engine external: base URLs of its servers, one instance each.")


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
    if lifecycle is not None:
        _check_devices(lifecycle, found)
    entries = _models(document, found)
    _check_names(entries, found)
    for name, entry in entries.items():
        _check_engine(f"models.{name}", name, entry, found)
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
    return Loaded(document, lifecycle, telemetry, Catalog(models), specs, *folders, hub_cache, entries), found


def _models(document: Document, found: list[Problem]) -> dict[str, ModelSettings]:
    """Every entry with `defaults` merged in; a problem of `defaults` is said once, there."""
    defaults = document.section("defaults")
    check(ModelSettings, defaults, "defaults", found)
    entries: dict[str, ModelSettings] = {}
    for name, own in document.section("models").items():
        path = f"models.{name}"
        if not isinstance(name, str) or not re.fullmatch(_NAME, name):
            found.append(Problem(path, f"{name!r} is no name for a model; give {_NAME_WORDS}"))
            continue
        if own is not None and not isinstance(own, dict):
            found.append(Problem(path, f"{own!r} is not allowed; give keys and values"))
            continue
        given: dict[str, Any] = own or {}
        mine: list[Problem] = []
        entry = check(ModelSettings, {**defaults, **given}, path, mine)
        found.extend(
            p for p in mine if p.path.removeprefix(f"{path}.").split(".")[0] in given or p.path == path
        )
        if entry is not None:
            entries[name] = entry
    return entries


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


def _check_names(entries: dict[str, ModelSettings], found: list[Problem]) -> None:
    owners: dict[str, str] = {name: name for name in entries}
    for name, entry in entries.items():
        for index, alias in enumerate(entry.aliases):
            other = owners.setdefault(alias, name)
            if other != name or entry.aliases.index(alias) != index or alias == name:
                whose = "given twice" if other == name else f"also a name of {other}"
                found.append(Problem(f"models.{name}.aliases.{index}", f"{alias!r} is {whose}"))


def _check_engine(path: str, name: str, entry: ModelSettings, found: list[Problem]) -> None:
    required = {"command": "command", "vllm": "source", "llamacpp": "source", "external": "urls"}[
        entry.engine
    ]
    if not getattr(entry, required):
        found.append(Problem(f"{path}.{required}", f"is required by the engine {entry.engine}"))
    if entry.engine == "command":
        _check_command(path, entry, found)
    _check_gguf(path, entry, found)
    for argument in entry.extra_args:
        if instead := ENGINES[entry.engine].flags.instead(argument):
            text = f"{argument!r} is set by the service; {instead}"
            found.append(Problem(f"{path}.extra_args", text))
    if entry.extra_args and entry.engine in ("command", "external"):
        found.append(
            Problem(f"{path}.extra_args", f"has no function with the engine {entry.engine}", warning=True)
        )
    if entry.always_on and entry.engine == "external":
        found.append(Problem(f"{path}.always_on", "has no function with the engine external", warning=True))
    if entry.max_concurrent and entry.max_queue and entry.max_concurrent > entry.max_queue:
        text = f"{entry.max_concurrent} is more than max_queue ({entry.max_queue})"
        found.append(Problem(f"{path}.max_concurrent", text, warning=True))
    if entry.vram is None and entry.engine == "command":
        text = "is not given: the model gets a whole card of its pool until it was measured"
        found.append(Problem(f"{path}.vram", text, warning=True))
    _check_reservation(path, entry, found)


def _check_reservation(path: str, entry: ModelSettings, found: list[Problem]) -> None:
    seqs = entry.kv_reservation_seqs
    if seqs is None:
        return
    if entry.engine != "vllm":
        text = f"has no function with the engine {entry.engine}"
        found.append(Problem(f"{path}.kv_reservation_seqs", text, warning=True))
    elif entry.max_num_seqs is not None and seqs > entry.max_num_seqs:
        text = f"{seqs} is more than max_num_seqs ({entry.max_num_seqs}), which counts"
        found.append(Problem(f"{path}.kv_reservation_seqs", text, warning=True))


def _check_gguf(path: str, entry: ModelSettings, found: list[Problem]) -> None:
    if entry.engine == "vllm" and entry.source and not entry.tokenizer and is_gguf(parse(entry.source)):
        text = "is not given: vLLM then converts the GGUF file's own, which takes long and may be wrong"
        found.append(Problem(f"{path}.tokenizer", text, warning=True))


def _check_command(path: str, entry: ModelSettings, found: list[Problem]) -> None:
    if entry.command and not entry.command[0].strip():
        found.append(Problem(f"{path}.command.0", "is empty; give the program"))
    for index, argument in enumerate(entry.command):
        # Other braces (JSON in an argument) are the program's own business; a misspelt word isn't.
        unknown = set(re.findall(r"\{([A-Za-z_]*)\}", argument)) - _PLACEHOLDERS
        text = "is no placeholder; there are {port}, {name} and {devices}"
        found += [Problem(f"{path}.command.{index}", f"{{{word}}} {text}") for word in sorted(unknown)]
    if entry.command and not any("{port}" in argument for argument in entry.command):
        found.append(
            Problem(f"{path}.command", "has no {port}: the server must listen on the port that it is given")
        )


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
