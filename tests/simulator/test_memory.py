"""The ledger of pretended GPUs, and the nvidia-smi that reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulator.conftest import READY, Simulate
from tidegate_simulator.ledger import Ledger, OutOfMemory, start_time
from tidegate_simulator.options import memory_claim, parse
from tidegate_simulator.sizes import parse_count, parse_mib

GPU_QUERY = "--query-gpu=index,uuid,name,memory.total,memory.used,memory.free"
APP_QUERY = "--query-compute-apps=gpu_uuid,pid,used_memory"
CSV = "--format=csv,noheader,nounits"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A ledger of two devices, by environment."""
    return {
        "TIDEGATE_SIMULATOR_LEDGER": str(tmp_path / "ledger.json"),
        "TIDEGATE_SIMULATOR_DEVICES": "24576,8192",
        "CUDA_VISIBLE_DEVICES": "",
    }


def smi(environment: dict[str, str], *arguments: str) -> list[str]:
    """The lines that nvidia-smi prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tidegate_simulator.nvidia_smi", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def used(environment: dict[str, str]) -> list[int]:
    """MiB used on each device."""
    return [int(line) for line in smi(environment, "--query-gpu=memory.used", CSV)]


def test_claims_show_and_go_with_the_process(simulate: Simulate, environment: dict[str, str]) -> None:
    """What a simulator claims shows under its pid, and is free at once when it is killed."""
    simulated = simulate("--vram", "10GiB", "--device", "0,1", "--vram", "6GiB", **environment)
    gpus = smi(environment, GPU_QUERY, CSV)
    index, uuid, name, total, held, free = gpus[0].split(", ")
    assert (index, total, held, free) == ("0", "24576", "6144", str(24576 - 6144))
    assert name
    assert smi(environment, APP_QUERY, CSV)[0] == f"{uuid}, {simulated.process.pid}, 6144"
    simulated.process.kill()
    simulated.wait()
    assert used(environment) == [0, 0]
    assert smi(environment, APP_QUERY, CSV) == []


def test_a_claim_that_does_not_fit_fails_as_cuda_does(
    simulate: Simulate, environment: dict[str, str]
) -> None:
    """A model that doesn't fit beside the first prints CUDA's line and exits 1; the first keeps its own."""
    simulate("--vram", "20GiB", **environment)
    second = simulate.start("--port", "0", "--vram", "5GiB", **environment)
    assert second.wait() == 1
    second.line("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 5.00 GiB")
    assert used(environment) == [20480, 0]


def test_utilization_is_checked_as_vllm_does(simulate: Simulate, environment: dict[str, str]) -> None:
    """`serve` claims a fraction of the total, and fails with vLLM's words where that isn't free."""
    first = simulate.start("serve", "m", "--port", "0", "--gpu-memory-utilization", "0.5", **environment)
    first.line(READY)
    assert used(environment) == [12288, 0]
    second = simulate.start("serve", "m", "--port", "0", **environment)
    assert second.wait() == 1
    second.line("Free memory on device cuda:0 (12.00/24.00 GiB) on startup is less than desired GPU memory")
    third = simulate.start(
        "serve", "m", "--port", "0", "--device", "1", "--kv-cache-memory-bytes", "1G", **environment
    )
    third.line(READY)
    assert used(environment) == [12288, 2048]


def test_sleep_gives_memory_back(simulate: Simulate, environment: dict[str, str]) -> None:
    """A sleeper holds its residue; waking where another has taken the memory crashes it, as vLLM does."""
    simulated = simulate(
        "--enable-sleep-mode",
        "--vram",
        "20GiB",
        "--sleep-residue",
        "1GiB",
        VLLM_SERVER_DEV_MODE="1",
        **environment,
    )
    simulated.http.post("/sleep")
    simulated.line("Sleep mode freed 19.00 GiB memory, 1.00 GiB memory is still in use")
    assert used(environment)[0] == 1024
    simulated.http.post("/wake_up")
    assert used(environment)[0] == 20480
    simulated.http.post("/sleep")
    simulate("--vram", "10GiB", **environment)
    assert simulated.http.post("/wake_up").status_code == 500
    assert simulated.wait() == 1
    simulated.line("torch.OutOfMemoryError")


def test_an_orphaned_worker_keeps_the_memory(simulate: Simulate, environment: dict[str, str]) -> None:
    """With --worker orphan a child holds the memory and outlives a killed parent; with child it does not show
    the parent's pid."""
    simulated = simulate("--vram", "1GiB", "--worker", "orphan", **environment)
    pid = int(smi(environment, "--query-compute-apps=pid", CSV)[0])
    assert pid != simulated.process.pid
    simulated.process.kill()
    simulated.wait()
    assert used(environment)[0] == 1024
    os.kill(pid, 9)


def test_entries_of_dead_processes_are_swept(environment: dict[str, str], tmp_path: Path) -> None:
    """An entry counts while its process lives: the same pid with another start time is another process."""
    ledger = Ledger(tmp_path / "ledger.json", environment)
    ledger.claim((), 1000, pid=os.getpid(), model="m")
    assert [gpu.used_mib for gpu in ledger.devices()] == [1000, 0]
    document = json.loads(ledger.path.read_text())
    document["devices"][0]["entries"][0]["start_time"] -= 1
    ledger.path.write_text(json.dumps(document))
    assert [gpu.used_mib for gpu in ledger.devices()] == [0, 0]
    assert start_time(2**22 + 1) is None


def test_claims_are_all_or_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    """A claim on two devices that fits one of them changes neither."""
    ledger = Ledger(tmp_path / "ledger.json", environment)
    ledger.claim(["1"], 100, pid=os.getpid(), model="m")
    with pytest.raises(OutOfMemory):
        ledger.claim(["0", "1"], 10000, pid=os.getpid(), model="m")
    assert [gpu.used_mib for gpu in ledger.devices()] == [0, 100]
    with pytest.raises(LookupError):
        ledger.claim(["7"], 1, pid=os.getpid(), model="m")


def test_nvidia_smi_forms(environment: dict[str, str]) -> None:
    """Columns come in the order asked, with header and units unless told otherwise; -L lists."""
    assert smi(environment, "--query-gpu=memory.total,index", "--format=csv") == [
        "memory.total [MiB], index",
        "24576 MiB, 0",
        "8192 MiB, 1",
    ]
    assert smi(environment, "--query-gpu=index", "--format=csv,noheader", "-i", "1") == ["1"]
    assert smi(environment, "--query-compute-apps=pid,used_memory", "--format=csv") == [
        "pid, used_gpu_memory [MiB]"
    ]
    assert smi(environment, "-L")[1].startswith("GPU 1: NVIDIA Simulated GPU (UUID: GPU-")


def test_nvidia_smi_faults(environment: dict[str, str], tmp_path: Path) -> None:
    """Faults come from the environment, or from a file beside the ledger while a fleet runs."""
    assert (
        smi(environment | {"TIDEGATE_SIMULATOR_SMI_FAULT": "na"}, "--query-gpu=index,memory.total", CSV)[0]
        == "0, [N/A]"
    )
    missing = smi(
        environment | {"TIDEGATE_SIMULATOR_SMI_FAULT": "missing-fields"}, "--query-gpu=index,uuid", CSV
    )
    assert missing == ["0", "1"]
    (tmp_path / "ledger.json.smi-fault").write_text("garbage")
    assert smi(environment, GPU_QUERY, CSV)[0].startswith("\x00")
    (tmp_path / "ledger.json.smi-fault").write_text("exit1")
    with pytest.raises(AssertionError, match="NVIDIA-SMI has failed"):
        smi(environment, GPU_QUERY, CSV)
    environment["TIDEGATE_SIMULATOR_SMI_FAULT"] = "hang"
    command = [sys.executable, "-m", "tidegate_simulator.nvidia_smi"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, env={**os.environ, **environment}, timeout=0.5)


def test_claims_follow_the_flags() -> None:
    """--vram goes before the KV cache, that before utilization; the plain form claims nothing by itself."""
    cases = {
        "--model m": 0,
        "serve m": 920,
        "serve m --gpu-memory-utilization 0.5": 500,
        "serve m --kv-cache-memory-bytes 1G --weights 100": 1124,
        "serve m --kv-cache-memory-bytes 1G --vram 7": 7,
    }
    for line, mib in cases.items():
        assert memory_claim(parse(line.split(), {}), 1000) == mib, line


def test_sizes() -> None:
    """Sizes read as vLLM's: a small letter counts 1000s, a capital 1024s; memory's bare number is MiB."""
    assert [parse_count(text) for text in ("4k", "4K", "1.5GiB")] == [4000, 4096, 1610612736]
    assert [parse_mib(text) for text in ("24576", "10GiB", "512MiB")] == [24576, 10240, 512]
    with pytest.raises(ValueError, match="not an amount"):
        parse_mib("many")
