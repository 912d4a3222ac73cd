"""How the commands look that ask a running service: one function and one module for each noun.

The module of a noun has its name and a `run(arguments)`; it is imported only when its command is carried
out, so that help comes at once.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

Parser = argparse.ArgumentParser


def run(arguments: argparse.Namespace) -> int:
    """Carries out the command of a noun; returns the exit status."""
    status: int = importlib.import_module(f"tidegate_serve.{arguments.command}").run(arguments)
    return status


def add(commands: Any) -> None:
    """Adds every noun to the parser's commands."""
    _leases(commands)
    _queues(commands)


def _leases(commands: Any) -> None:
    actions = _noun(commands, "leases", "who is being served: list the leases, end one")
    listing = actions.add_parser("list", help="all leases, oldest first")
    listing.add_argument("--model", default="", metavar="NAME", help="only this model's")
    revoke = actions.add_parser("revoke", help="end one lease: its request ends with an error")
    revoke.add_argument("lease_id", metavar="LEASE", help="as `leases list` shows it")
    _json(listing)
    _where("admission", listing, revoke)


def _queues(commands: Any) -> None:
    queues = commands.add_parser("queues", help="who waits, and for what: every model's queue and slots")
    queues.add_argument("--watch", action="store_true", help="again whenever it changes, until Ctrl-C")
    _json(queues, "as JSON (--watch: one line each time)")
    _where("admission", queues)


def _noun(commands: Any, name: str, text: str) -> Any:
    """A command that has actions; returns what they are added to."""
    return commands.add_parser(name, help=text).add_subparsers(dest="action", required=True, metavar="ACTION")


def _json(command: Parser, text: str = "as JSON") -> None:
    command.add_argument("--json", action="store_true", help=text)


def _where(service: str, *commands: Parser) -> None:
    """The options that say which service is asked."""
    for command in commands:
        where = command.add_mutually_exclusive_group(required=True)
        where.add_argument("--config", metavar="FILE", help="the configuration file of what runs")
        where.add_argument("--address", metavar="ADDRESS", help=f"{service}'s host:port or unix:/path")
