"""Who holds how much memory of which pretended GPU: one JSON file, shared by every simulator on a machine.

What a dead process held is free at once: each read leaves out the entries whose process is gone (the process
id with the start time, since an id alone may have been given to another).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

LEDGER_VARIABLE = "TIDEGATE_SIMULATOR_LEDGER"
DEVICES_VARIABLE = "TIDEGATE_SIMULATOR_DEVICES"
_DEFAULT_DEVICES = "24576"


class OutOfMemory(Exception):
    """A claim does not fit."""

    def __init__(self, device: Device, asked_mib: int) -> None:
        super().__init__(f"GPU {device.index}: {asked_mib} MiB asked, {device.free_mib} MiB free")
        self.device = device
        self.asked_mib = asked_mib


@dataclass(slots=True)
class Entry:
    """Memory that a process holds on a device."""

    pid: int
    start_time: int
    """Field 22 of /proc/PID/stat, in clock ticks since the machine's start."""
    mib: int
    model: str


@dataclass(slots=True)
class Device:
    """A pretended GPU."""

    index: int
    uuid: str
    name: str
    total_mib: int
    entries: list[Entry] = field(default_factory=list)

    @property
    def used_mib(self) -> int:
        """Held by living processes."""
        return sum(entry.mib for entry in self.entries)

    @property
    def free_mib(self) -> int:
        """Not held, never negative."""
        return max(0, self.total_mib - self.used_mib)


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks; None if it's gone or only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name, in parentheses, may itself hold spaces and parentheses: fields are counted from its end.
    state, *rest = stat[stat.rindex(b")") + 2 :].split()
    return None if state in (b"Z", b"X") else int(rest[18])


def new_devices(declared: str) -> list[Device]:
    """Devices of the sizes in `declared`: MiB, comma separated, in the order of their index."""
    return [
        Device(index, f"GPU-51d1de9a-7a7e-4000-8000-{index:012d}", "NVIDIA Simulated GPU", int(size))
        for index, size in enumerate(declared.split(","))
    ]


class Ledger:
    """The file, locked for each reading and writing."""

    def __init__(self, path: Path, environment: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._declared = (os.environ if environment is None else environment).get(DEVICES_VARIABLE, "")

    def __repr__(self) -> str:
        return f"Ledger({str(self.path)!r})"

    def devices(self) -> list[Device]:
        """The devices with what living processes hold."""
        with self._locked() as devices:
            return devices

    def pick(self, names: Sequence[str]) -> list[Device]:
        """The devices with these indices or uuids; the first one where none is named. Raises LookupError."""
        return _named(self.devices(), names)

    def claim(self, names: Sequence[str], mib: int, *, pid: int, model: str) -> None:
        """Sets what a process holds on each named device to `mib`; 0 gives it back.

        All or nothing: raises OutOfMemory, and changes nothing, where one device has too little.
        """
        started = start_time(pid)
        with self._locked() as devices:
            for device in _named(devices, names):
                device.entries = [entry for entry in device.entries if entry.pid != pid]
                if mib > device.free_mib:
                    raise OutOfMemory(device, mib)
                if mib and started is not None:
                    device.entries.append(Entry(pid, started, mib, model))
            self._write(devices)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[list[Device]]:
        # The lock is on a file beside: the ledger itself is replaced at each write, and a lock on a replaced
        # file would hold nobody back.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.path}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._read()

    def _read(self) -> list[Device]:
        try:
            document = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            devices = new_devices(self._declared or _DEFAULT_DEVICES)
            self._write(devices)
            return devices
        devices = []
        for fields in document["devices"]:
            entries = [Entry(**entry) for entry in fields.pop("entries", ())]
            living = [entry for entry in entries if start_time(entry.pid) == entry.start_time]
            devices.append(Device(**fields, entries=living))
        return devices

    def _write(self, devices: list[Device]) -> None:
        document = {"devices": [asdict(device) for device in devices]}
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1)
        os.replace(name, self.path)


def _named(devices: list[Device], names: Sequence[str]) -> list[Device]:
    if not names:
        return devices[:1]
    by_name = {str(device.index): device for device in devices} | {device.uuid: device for device in devices}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise LookupError(f"no device {', '.join(missing)}; the ledger has {', '.join(by_name)}")
    return [by_name[name] for name in names]
