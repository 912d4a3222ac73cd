"""The `tidegate` command: everything a person types. It starts services and imports none of them."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata, util
from typing import NoReturn

from tidegate_serve import commands as operators

_NEEDS = {"edge": "httptools", "admission": "grpc", "lifecycle": "httpx"}
"""A module of each service's own dependencies, to say what to install when it is missing."""


def main() -> int:
    """Entry point; returns the exit status."""
    arguments, rest = _parser().parse_known_args()
    if arguments.command in _NEEDS:
        _become(arguments.command, [*rest, "--config", arguments.config])
    if rest:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "config":
        from tidegate_serve.check import check

        return check(arguments.file)
    if arguments.command != "serve":
        return operators.run(arguments)
    from tidegate_serve.supervisor import serve

    missing = [service for service in _NEEDS if _missing(service)]
    if missing:
        print(f"tidegate: {_install(missing)}", file=sys.stderr)
        return 1
    return serve(arguments.config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tidegate", description="Many language models on few GPUs behind one OpenAI-compatible address."
    )
    parser.add_argument("--version", action="version", version=f"tidegate {metadata.version('tidegate')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {
        "serve": "all three services on this machine, model servers included",
        "edge": "only the edge: OpenAI-compatible HTTP",
        "admission": "only admission: queues and leases",
        "lifecycle": "only lifecycle: starts and stops model servers",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", required=True, metavar="FILE", help="the configuration file")
    config = commands.add_parser("config", help="look at a configuration file")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="print every problem; exit status 78 if there is one")
    check.add_argument("file", metavar="FILE")
    operators.add(commands)
    return parser


def _become(service: str, arguments: list[str]) -> NoReturn:
    """Replaces this process by the service's, so that signals and exit status are the service's own."""
    if _missing(service):
        print(f"tidegate: {_install([service])}", file=sys.stderr)
        sys.exit(1)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", f"tidegate_{service}", *arguments])  # noqa: S606 - no shell


def _missing(service: str) -> bool:
    return util.find_spec(_NEEDS[service]) is None


def _install(services: list[str]) -> str:
    extras = "all" if len(services) > 1 else services[0]
    return f"{' and '.join(services)} can't run: install it with  pip install 'tidegate[{extras}]'"


if __name__ == "__main__":
    sys.exit(main())
