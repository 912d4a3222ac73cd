"""`make check`: every static check, all of them run, each failure shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SERVICES = [str(path) for path in sorted(ROOT.glob("services/*/tidegate_*"))]

CHECKS: dict[str, list[str]] = {
    "ruff": [str(BIN / "ruff"), "check", "."],
    "ruff format": [str(BIN / "ruff"), "format", "--check", "."],
    "mypy": [str(BIN / "mypy"), *SERVICES, "tests", "bench", "scripts", "deploy/examples"],
    "import-linter": [str(BIN / "lint-imports")],
    "buf lint": [str(BIN / "buf"), "lint", "protos"],
    "buf breaking": [str(BIN / "buf"), "breaking", "protos", "--against", ".git#branch=main,subdir=protos"],
    "protos current": [sys.executable, "scripts/protos.py", "--check"],
    "reference current": [sys.executable, "scripts/reference.py", "--check"],
}


def main() -> int:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    failed = []
    for name, command in CHECKS.items():
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(f"{name}: {'ok' if done.returncode == 0 else 'FAILED'}")
        if done.returncode:
            failed.append(name)
            print(done.stdout)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
