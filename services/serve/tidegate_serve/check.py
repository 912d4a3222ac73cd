"""`tidegate config check`: asks each service about its own sections and merges what they say."""

from __future__ import annotations

import json
import subprocess
import sys

from tidegate_chassis.config import EXIT_CONFIG, Problem

SERVICES = ("lifecycle", "admission", "edge")


def check(path: str) -> int:
    """Prints every problem with its path and what is allowed; 78 if there is one, else 0."""
    problems = find_problems(path)
    for problem in problems:
        print(problem)
    refused = any(not problem.warning for problem in problems)
    if not refused:
        print(f"{path} is a valid configuration")
    return EXIT_CONFIG if refused else 0


def find_problems(path: str) -> list[Problem]:
    """What the three services say about a file, each problem once, in the order of the paths."""
    running = {
        service: subprocess.Popen(
            [sys.executable, "-m", f"tidegate_{service}", "--config", path, "--check"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for service in SERVICES
    }
    problems: set[Problem] = set()
    for service, process in running.items():
        output, errors = process.communicate(timeout=60)
        try:
            problems.update(Problem(*item) for item in json.loads(output))
        except ValueError:
            problems.add(
                Problem(service, f"its check failed: {errors.strip()[-500:] or output.strip()[-500:]}")
            )
    return sorted(problems)
