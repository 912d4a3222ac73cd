"""What this simulator holds in the ledger, and which process is said to hold it."""

from __future__ import annotations

import os
import subprocess
import sys

from tidegate_simulator.ledger import Ledger, OutOfMemory
from tidegate_simulator.options import Options, memory_claim
from tidegate_simulator.sizes import gib

# vLLM's memory is held by a child, not by the process that was started. A child that reads its stdin ends
# with its parent; one that doesn't stays behind when the parent is killed, and keeps the memory.
_WORKERS = {
    "child": "import sys; sys.stdin.read()",
    "orphan": "import signal; signal.pause()",
}


class TooLittleMemory(Exception):
    """The claim does not fit; the text is the line that vLLM prints."""


class Memory:
    """The claim of one simulator on each of its devices. Without a ledger nothing is claimed."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._ledger = Ledger(options.ledger) if options.ledger else None
        self._worker: subprocess.Popen[bytes] | None = None
        self.held_mib = 0
        """Held now, on each device."""
        self.whole_mib = options.vram_mib or 0
        """Held while awake, on each device."""

    def start(self) -> None:
        """Claims what the model needs. Raises TooLittleMemory, or LookupError for no such device."""
        script = _WORKERS.get(self._options.worker)
        if script is not None:
            # Its stdout and stderr are not ours: an orphan would keep a reader of our output waiting.
            null = subprocess.DEVNULL
            self._worker = subprocess.Popen(
                [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=null, stderr=null
            )
        if self._ledger is None:
            return
        devices = self._ledger.pick(self._options.devices)
        self.whole_mib = memory_claim(self._options, min(device.total_mib for device in devices))
        for device in devices:
            if self._by_utilization and self.whole_mib > device.free_mib:
                raise TooLittleMemory(
                    f"ValueError: Free memory on device cuda:{device.index} "
                    f"({gib(device.free_mib)}/{gib(device.total_mib)} GiB) on startup is less than desired "
                    f"GPU memory utilization ({self._options.utilization}, {gib(self.whole_mib)} GiB). "
                    "Decrease GPU memory utilization or reduce GPU memory used by other processes."
                )
        self.hold(self.whole_mib)

    def hold(self, mib: int) -> None:
        """Changes the claim on each device, all or none. Raises TooLittleMemory."""
        if self._ledger is not None:
            pid = self._worker.pid if self._worker else os.getpid()
            try:
                self._ledger.claim(self._options.devices, mib, pid=pid, model=self._options.names[0])
            except OutOfMemory as error:
                raise TooLittleMemory(out_of_memory_line(error)) from error
        self.held_mib = mib

    def sleeping_mib(self, asleep: frozenset[str]) -> int:
        """What is held while those parts sleep: weights and KV cache are each given back apart."""
        residue = min(self._options.sleep_residue_mib, self.whole_mib)
        weights = min(self._options.weights_mib, self.whole_mib - residue)
        cache = self.whole_mib - residue - weights
        return residue + (0 if "weights" in asleep else weights) + (0 if "kv_cache" in asleep else cache)

    def close(self) -> None:
        """Gives all back and ends the worker."""
        self.hold(0)
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()

    @property
    def _by_utilization(self) -> bool:
        options = self._options
        return options.vram_mib is None and options.kv_cache_bytes is None


def out_of_memory_line(error: OutOfMemory | None = None) -> str:
    """PyTorch's words for it."""
    if error is None:
        return (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
            "capacity of 23.64 GiB of which 1.02 GiB is free."
        )
    device = error.device
    return (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {gib(error.asked_mib)} GiB. "
        f"GPU {device.index} has a total capacity of {gib(device.total_mib)} GiB of which "
        f"{gib(device.free_mib)} GiB is free."
    )
