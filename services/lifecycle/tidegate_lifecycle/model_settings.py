"""Sections `defaults` and `models`: every key, its range, and what doesn't go together."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field

from tidegate_chassis.config import Document, Problem, Settings, check
from tidegate_chassis.kinds import Choice, Duration, Flag, Text, Whole
from tidegate_lifecycle.docker_settings import IMAGE, VOLUME
from tidegate_lifecycle.engines import ENGINES
from tidegate_lifecycle.hub.source import is_gguf, parse
from tidegate_lifecycle.kinds import JsonObject, ListOf, Mapped, Maybe, Vram, VramKind

NAME = r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}"
NAME_WORDS = "1 to 128 letters, digits and . _ : / @ + -, beginning with a letter or digit"
_PLACEHOLDERS = {"port", "name", "devices"}
TEXT = Text(r"[^\x00-\x1f]*", "a text without control characters")


class ModelSettings(Settings):
    """One entry of `models`; the same keys, none required, make up `defaults`."""

    engine: Annotated[str, Choice("command", "vllm", "llamacpp", "external")] = Field(
        "command", description="How its server is run: command, vllm, llamacpp or external."
    )
    command: Annotated[tuple[str, ...], ListOf(Text(r"[^\x00]*", "a text"))] = Field(
        (), description="Engine command: the argument vector, with {port}, {name} and {devices}; no shell."
    )
    aliases: Annotated[tuple[str, ...], ListOf(Text(NAME, NAME_WORDS))] = Field(
        (), description="Other names for it."
    )
    upstream_model: Annotated[str | None, Maybe(TEXT)] = Field(
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
    pool: Annotated[str, Text(NAME, NAME_WORDS)] = Field(
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


def read_models(document: Document, found: list[Problem]) -> dict[str, ModelSettings]:
    """Every entry with `defaults` merged in; a problem of `defaults` is said once, there."""
    defaults = document.section("defaults")
    check(ModelSettings, defaults, "defaults", found)
    entries: dict[str, ModelSettings] = {}
    for name, own in document.section("models").items():
        path = f"models.{name}"
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            found.append(Problem(path, f"{name!r} is no name for a model; give {NAME_WORDS}"))
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


def check_names(entries: dict[str, ModelSettings], found: list[Problem]) -> None:
    owners: dict[str, str] = {name: name for name in entries}
    for name, entry in entries.items():
        for index, alias in enumerate(entry.aliases):
            other = owners.setdefault(alias, name)
            if other != name or entry.aliases.index(alias) != index or alias == name:
                whose = "given twice" if other == name else f"also a name of {other}"
                found.append(Problem(f"models.{name}.aliases.{index}", f"{alias!r} is {whose}"))


def check_engine(path: str, name: str, entry: ModelSettings, found: list[Problem]) -> None:
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
