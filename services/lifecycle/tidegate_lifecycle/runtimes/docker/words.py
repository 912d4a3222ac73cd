"""What Docker says, in words for callers: why a call failed, and how a container ended. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from typing import Any

from tidegate_lifecycle import logs

REMOVED = "removed by hand"
OUT_OF_MEMORY = "killed: out of memory"

# The daemon's wording moves between releases, so these are hints; what none of them knows is told as it is,
# without paths and addresses.
_KNOWN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), text)
    for pattern, text in (
        (
            r'exec: \\?"(?P<what>[^"\\]*)\\?":? .*(executable file not found|no such file)',
            "the program {what} was not found in the image",
        ),
        (
            r'exec: \\?"(?P<what>[^"\\]*)\\?":? .*permission denied',
            "the program {what} in the image may not be run",
        ),
        (
            r"could not select device driver|unknown runtime.*nvidia|nvidia-container-cli",
            "Docker can't give it the GPU: the NVIDIA container toolkit is missing or doesn't work",
        ),
        (
            r"bind source path does not exist",
            "a folder of `volumes` or lifecycle.hf_cache doesn't exist on the Docker host",
        ),
        (r"no space left on device", "the disk of the Docker host is full"),
        (r"network \S+ not found|network .* has no endpoint", "its network is gone"),
        (r"no such image|image .* not found", "its image isn't on the Docker host"),
        (
            r"range of CPUs is from (?P<what>[\d.]+ to [\d.]+)",
            "lifecycle.docker.cpus must be from {what} on this Docker host",
        ),
        (
            r"minimum memory limit allowed is (?P<what>\S+)",
            "lifecycle.docker.memory must be {what} at least",
        ),
    )
)


def why(said: str) -> str:
    """Why the daemon declined, without paths, addresses or environment; 300 characters at most."""
    for pattern, text in _KNOWN:
        found = pattern.search(said)
        if found:
            what = found.groupdict().get("what") or ""
            return text.format(what=what.rpartition("/")[2] if what.startswith("/") else what)
    return logs.reason([f"Docker error: {line}" for line in said.splitlines()[:5]]) or "Docker gave an error"


def unreachable(error: BaseException) -> str:
    """Why there was no connection, or none that lasted."""
    text = str(error)
    for clue, told in (
        ("Permission denied", "its socket may not be used by this user (is it in the group docker?)"),
        ("No such file", "its socket doesn't exist (is Docker installed and running?)"),
        ("Connection refused", "nobody listens on its socket (is it running?)"),
        ("timed out", "it gave no answer in time"),
    ):
        if clue in text:
            return f"the Docker daemon can't be reached: {told}"
    return "the Docker daemon can't be reached: the connection was closed"


def ending(state: Mapping[str, Any], oom: bool = False) -> str:
    """How a container ended, by the State of its inspection; `oom`: an event told that memory ran out."""
    code, out_of_memory = int(state.get("ExitCode") or 0), bool(state.get("OOMKilled")) or oom
    if state.get("Status") == "removing":
        return REMOVED
    if code == 137 and out_of_memory:
        return OUT_OF_MEMORY
    text = f"signal {code - 128}" if code - 128 in set(signal.Signals) else f"exit status {code}"
    return f"{text}, after it ran out of memory" if out_of_memory else text
