"""Each service runs with its own dependencies alone, from a wheel, and has nothing of the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gateway import free_port, wait_for

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).parent / "uv"
ABSENT = {
    "edge": ["httpx", "aiohttp", "docker", "huggingface_hub"],
    "admission": ["aiohttp", "httpx", "docker", "huggingface_hub"],
    "lifecycle": ["aiohttp"],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that users install."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([UV, "build", "--quiet", "--wheel", "--out-dir", folder, ROOT], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.parametrize("service", ["edge", "admission", "lifecycle"])
def test_each_extra_alone_starts_its_service(tmp_path: Path, wheel: Path, service: str) -> None:
    """`pip install tidegate[SERVICE]` is enough for that service, and brings none of the others' packages."""
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, f"{wheel}[{service}]"], check=True)
    for module in ABSENT[service]:
        missing = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
        assert missing.returncode == 1, f"{module} is installed"
    config = tmp_path / "tidegate.yaml"
    config.write_text(f"{service}: {{listen: '127.0.0.1:{free_port()}'}}\nmodels: {{}}\n")
    log = tmp_path / "log"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [tmp_path / "venv" / "bin" / "tidegate", service, "--config", config],
            stdout=output, stderr=output, cwd=tmp_path, env=environ,
        )  # fmt: skip
    try:
        wait_for(lambda: "listening" in log.read_text() or process.poll() is not None, "it listens", 30)
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        assert process.wait(15) == 0, log.read_text()


def test_a_service_without_its_extra_says_what_to_install(tmp_path: Path, wheel: Path) -> None:
    """The bare wheel has the command; a service that can't run names the extra."""
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, wheel], check=True)
    command = [str(tmp_path / "venv" / "bin" / "tidegate"), "edge", "--config", "x.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install 'tidegate[edge]'" in done.stderr
