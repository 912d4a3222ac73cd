"""What callers are told of Docker's errors and of a container's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tidegate_chassis.config import ConfigError
from tidegate_lifecycle.runtimes.docker import container, place, words


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            'OCI runtime create failed: runc: exec: "/opt/x/srv": stat /opt/x/srv: no such file',
            "the program srv was not found in the image",
        ),
        (
            'exec: "srv": executable file not found in $PATH: unknown',
            "the program srv was not found in the image",
        ),
        ('exec: "/a/srv": permission denied: unknown', "the program srv in the image may not be run"),
        ('could not select device driver "" with capabilities: [[gpu]]', "Docker can't give it the GPU"),
        ("nvidia-container-cli: initialization error: driver not loaded", "Docker can't give it the GPU"),
        (
            'invalid mount config for type "bind": bind source path does not exist: /s/x',
            "a folder of `volumes`",
        ),
        ("write /var/lib/docker/tmp/x: no space left on device", "the disk of the Docker host is full"),
        (
            "Range of CPUs is from 0.01 to 2.00, as there are only 2",
            "lifecycle.docker.cpus must be from 0.01 to 2",
        ),
        ("Minimum memory limit allowed is 6MB", "lifecycle.docker.memory must be 6MB at least"),
        ("open /var/secret/x: HF_TOKEN=hf_abcdefgh is odd", "Docker error: open <path>"),
        ("", "Docker gave an error"),
    ],
)
def test_an_error_of_docker_is_told_without_paths_and_secrets(said: str, told: str) -> None:
    """A known one in our words, with the key that helps; another one as it is, cleaned."""
    text = words.why(said)
    assert text.startswith(told)
    for private in ("/opt", "/s/x", "/var", "hf_abc"):
        assert private not in text


@pytest.mark.parametrize(
    ("state", "oom", "told"),
    [
        ({"ExitCode": 0}, False, "exit status 0"),
        ({"ExitCode": 3}, False, "exit status 3"),
        ({"ExitCode": 143}, False, "signal 15"),
        ({"ExitCode": 137}, False, "signal 9"),
        ({"ExitCode": 137, "OOMKilled": True}, False, "killed: out of memory"),
        ({"ExitCode": 137}, True, "killed: out of memory"),
        ({"ExitCode": 1, "OOMKilled": True}, False, "exit status 1, after it ran out of memory"),
        ({"ExitCode": 137, "Status": "removing"}, False, "removed by hand"),
        ({}, False, "exit status 0"),
    ],
)
def test_an_end_is_told_as_processes_ends_are(state: dict[str, Any], oom: bool, told: str) -> None:
    """A status above 128 is a signal; memory that ran out is said."""
    assert words.ending(state, oom) == told


def test_the_network_of_ones_own_container_is_found_behind_its_prefix() -> None:
    """The name itself first, then the project's, then the only one that ends so; two are none."""
    assert place.pick("net", place.Own(("a_net", "net"))) == "net"
    assert place.pick("net", place.Own(("b_net", "a_net"), "a")) == "a_net"
    assert place.pick("net", place.Own(("x", "other_net"))) == "other_net"
    for own in (place.Own(("b_net", "a_net")), place.Own(("bridge",)), place.Own(())):
        with pytest.raises(ConfigError, match="isn't on 'net'"):
            place.pick("net", own)


def test_paths_of_ones_own_container_are_the_hosts() -> None:
    """The innermost mount counts; what no mount shows is nowhere."""
    own = place.Own((), "", {"/data": "/srv/data", "/data/hub": "/big/hub"})
    assert place.host_path("/data/hub/x", own) == "/big/hub/x"
    assert place.host_path("/data", own) == "/srv/data"
    assert place.host_path("/database", own) is None


def test_volumes_are_paths_or_names() -> None:
    """A slash, a dot or a tilde makes a path, relative to the configuration; else it is a volume's name."""
    folder = Path("/etc/tidegate")
    made = {text: container.volume(text, folder) for text in ("./w/../v:/w:ro", "/a:/b", "name:/n:rw")}
    assert [(one["Type"], one["Source"], one["ReadOnly"]) for one in made.values()] == [
        ("bind", "/etc/tidegate/v", True),
        ("bind", "/a", False),
        ("volume", "name", False),
    ]
    home = container.volume("~/x:/y", folder)
    assert home["Source"] == str(Path("~/x").expanduser())


def test_time_stamps_are_read() -> None:
    """Nanoseconds and all; what never was is 0."""
    assert container.seconds("2026-01-02T03:04:05.123456789Z") == pytest.approx(1767323045.123456789)
    assert container.seconds("2026-01-02T03:04:05Z") == 1767323045
    assert container.seconds("0001-01-01T00:00:00Z") == container.seconds("") == container.seconds("x") == 0
