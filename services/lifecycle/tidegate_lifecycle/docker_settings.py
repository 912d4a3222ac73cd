"""Section `lifecycle.docker`, and the values that only containers have."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tidegate_chassis.config import Settings
from tidegate_chassis.kinds import Choice, Number, Size, Text, Whole
from tidegate_lifecycle.kinds import Maybe

IMAGE = Text(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}", "the name of an image such as vllm/vllm-openai:latest")
VOLUME = Text(
    r"[^:\x00-\x1f]+:/[^:\x00-\x1f]*(:(ro|rw))?", "SOURCE:TARGET or SOURCE:TARGET:ro, TARGET an absolute path"
)


class DockerSettings(Settings):
    """Section `lifecycle.docker`."""

    image: Annotated[str, IMAGE] = Field(
        "vllm/vllm-openai:latest", description="Image of models that name none."
    )
    smi_image: Annotated[str, IMAGE] = Field(
        "ubuntu:24.04",
        description="Image in which nvidia-smi reads the cards where this machine has no such program: any "
        "with glibc, since the NVIDIA container toolkit puts it in.",
    )
    network: Annotated[
        str, Text(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", "a network's name of letters, digits and _ . -")
    ] = Field(
        "tidegate",
        description="Network of the containers, made when there is none; when lifecycle is a container, one "
        "that it is on itself (a compose project's prefix may be left out).",
    )
    shm_size: Annotated[int, Size("1MiB", "10TiB")] = Field(
        8 * 2**30, description="Size of /dev/shm in each container."
    )
    memory: Annotated[int | None, Maybe(Size("6MiB", "10TiB"))] = Field(
        None, description="Memory limit of a container, swap included; empty = none."
    )
    cpus: Annotated[float | None, Maybe(Number(0.1, 4096))] = Field(
        None, description="CPU limit of a container; empty = none."
    )
    pids: Annotated[int, Whole(1, 4194304)] = Field(
        4096, description="Limit of processes and threads in a container."
    )
    pull: Annotated[str, Choice("missing", "always", "never")] = Field(
        "missing", description="When images are pulled: missing, always or never."
    )
