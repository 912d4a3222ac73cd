"""`nvidia-smi` over the ledger: the queries that programs make, in the exact form the real one answers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tidegate_simulator.ledger import LEDGER_VARIABLE, Device, Entry, Ledger

FAULT_VARIABLE = "TIDEGATE_SIMULATOR_SMI_FAULT"
"""One of missing-fields, garbage, hang, exit1, na; a file LEDGER.smi-fault with such a word does the same."""

_Row = TypeVar("_Row")

# Column: the header's words, the unit, the value.
_GPU_COLUMNS: dict[str, tuple[str, str, Callable[[Device], object]]] = {
    "index": ("index", "", lambda gpu: gpu.index),
    "uuid": ("uuid", "", lambda gpu: gpu.uuid),
    "gpu_uuid": ("uuid", "", lambda gpu: gpu.uuid),
    "name": ("name", "", lambda gpu: gpu.name),
    "gpu_name": ("name", "", lambda gpu: gpu.name),
    "count": ("count", "", lambda _gpu: 1),
    "driver_version": ("driver_version", "", lambda _gpu: "580.65.06"),
    "pci.bus_id": ("pci.bus_id", "", lambda gpu: f"00000000:{gpu.index + 1:02X}:00.0"),
    "memory.total": ("memory.total", "MiB", lambda gpu: gpu.total_mib),
    "memory.used": ("memory.used", "MiB", lambda gpu: gpu.used_mib),
    "memory.free": ("memory.free", "MiB", lambda gpu: gpu.free_mib),
    "memory.reserved": ("memory.reserved", "MiB", lambda _gpu: 0),
    "utilization.gpu": ("utilization.gpu", "%", lambda _gpu: 0),
    "temperature.gpu": ("temperature.gpu", "", lambda _gpu: 40),
    "compute_cap": ("compute_cap", "", lambda _gpu: "9.0"),
    "mig.mode.current": ("mig.mode.current", "", lambda _gpu: "Disabled"),
}
_APP_COLUMNS: dict[str, tuple[str, str, Callable[[tuple[Device, Entry]], object]]] = {
    "gpu_uuid": ("gpu_uuid", "", lambda app: app[0].uuid),
    "gpu_name": ("gpu_name", "", lambda app: app[0].name),
    "pid": ("pid", "", lambda app: app[1].pid),
    "process_name": ("process_name", "", lambda _app: "VLLM::EngineCore"),
    "used_memory": ("used_gpu_memory", "MiB", lambda app: app[1].mib),
    "used_gpu_memory": ("used_gpu_memory", "MiB", lambda app: app[1].mib),
}


def main() -> None:
    """Answers like `nvidia-smi` and exits."""
    sys.exit(run(sys.argv[1:], os.environ))


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """One call: prints to stdout, returns the exit status."""
    path = environment.get(LEDGER_VARIABLE)
    fault = environment.get(FAULT_VARIABLE) or _fault_file(path)
    if fault == "hang":
        signal.pause()
    if fault == "exit1" or path is None:
        _say("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
        return 1
    if fault == "garbage":
        _say("\x00\x7fELF not, what, you expected\n,,,")
        return 0
    devices = Ledger(Path(path), environment).devices()
    return _answer(arguments, devices, fault)


def _answer(arguments: Sequence[str], devices: list[Device], fault: str) -> int:
    options = _options(arguments)
    wanted = options.get("--id")
    if wanted is not None:
        ids = wanted.split(",")
        devices = [gpu for gpu in devices if str(gpu.index) in ids or gpu.uuid in ids]
    if "--list-gpus" in options:
        for gpu in devices:
            _say(f"GPU {gpu.index}: {gpu.name} (UUID: {gpu.uuid})")
        return 0
    style = options.get("--format", "").split(",")
    if "--query-gpu" in options:
        return _table(options["--query-gpu"], _GPU_COLUMNS, devices, style, fault)
    if "--query-compute-apps" in options:
        apps = [(gpu, entry) for gpu in devices for entry in gpu.entries]
        return _table(options["--query-compute-apps"], _APP_COLUMNS, apps, style, fault)
    if options:
        _say(f"Invalid combination of input arguments: {' '.join(arguments)}")
        return 6
    for gpu in devices:
        _say(f"| {gpu.index}  {gpu.name} | {gpu.used_mib}MiB / {gpu.total_mib}MiB |")
    return 0


def _table(
    query: str,
    columns: Mapping[str, tuple[str, str, Callable[[_Row], object]]],
    rows: Sequence[_Row],
    style: Sequence[str],
    fault: str,
) -> int:
    names = [name.strip() for name in query.split(",")]
    if "csv" not in style:
        _say('"--format=" switch is missing or has no csv.')
        return 1
    for name in names:
        if name not in columns:
            _say(f'Field "{name}" is not a valid field to query.\n')
            return 2
    if fault == "missing-fields":
        names = names[:-1]
    chosen = [columns[name] for name in names]
    units = "nounits" not in style
    if "noheader" not in style:
        _say(", ".join(f"{title} [{unit}]" if unit else title for title, unit, _ in chosen))
    for row in rows:
        cells = []
        for _, unit, value in chosen:
            missing = fault == "na" and unit == "MiB"
            cells.append(
                "[N/A]" if missing else f"{value(row)} {unit}" if unit and units else str(value(row))
            )
        _say(", ".join(cells))
    return 0


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """The arguments by their long names; `--name value` and `--name=value` are the same."""
    long = {"-L": "--list-gpus", "-i": "--id"}
    found: dict[str, str] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("-"):
            name, _, value = argument.partition("=")
            name = long.get(name, name)
            found[name] = value
        elif name:
            found[name] = argument
    return found


def _fault_file(ledger: str | None) -> str:
    try:
        return Path(f"{ledger}.smi-fault").read_text().strip() if ledger else ""
    except OSError:
        return ""


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
