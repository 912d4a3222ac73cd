"""A stand-in for llama-server: refuses to start unless the file it is given is the right one."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from tests.lifecycle import model_server


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", dest="model", type=Path, required=True)
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--port", required=True)
    parser.add_argument("--sha256", required=True, help="of the model's file")
    parser.add_argument("--starts", required=True, help="the file's path is added here at each start")
    given, _ = parser.parse_known_args()
    with open(given.starts, "a") as starts:
        starts.write(f"{given.model}\n")
    if hashlib.sha256(given.model.read_bytes()).hexdigest() != given.sha256:
        sys.stderr.write("error loading model: it isn't the right one\n")
        sys.exit(1)
    sys.argv[1:] = ["--port", given.port]
    model_server.main()


if __name__ == "__main__":
    main()
