"""Regenerates the Python code of protos/ beside each .proto file.

`--check` writes nothing here and fails when the committed code is not what the generator makes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent.parent / "protos"
SOURCES = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("tidegate/*/v1/*.proto"))


def generate(into: Path) -> None:
    """Runs protoc with the Python, gRPC and mypy plugins."""
    outputs = [f"--{kind}_out={into}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    plugins = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *SOURCES],
        cwd=PROTOS,
        env=os.environ | {"PATH": plugins},
        check=True,
    )


def main() -> int:
    if "--check" not in sys.argv:
        generate(PROTOS)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = [
            made.relative_to(folder)
            for made in sorted(Path(folder).rglob("*_pb2*"))
            if not (PROTOS / made.relative_to(folder)).exists()
            or made.read_bytes() != (PROTOS / made.relative_to(folder)).read_bytes()
        ]
    for path in stale:
        print(f"protos/{path} is not what its .proto makes: run `make protos`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
