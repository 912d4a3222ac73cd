"""How the commands look that ask a running service: one function and one module for each noun.

The module of a noun has its name and a `run(arguments)`; it is imported only when its command is carried
out, so that help comes at once.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
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
    _models(commands)
    _footprints(commands)
    _devices(commands)
    _explain(commands)
    _events(commands)
    _logs(commands)
    _keys(commands)


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


def _models(commands: Any) -> None:
    actions = _noun(commands, "models", "what can be asked for: list the models, load, unload or pin one")
    listing = actions.add_parser(
        "list", help="every model: state, memory, devices, leases, why it can't be had"
    )
    load = actions.add_parser("load", help="start it without a request, and wait until it is ready")
    load.add_argument("--no-wait", action="store_true", help="only order it")
    unload = actions.add_parser("unload", help="end its servers when their requests are done")
    pin = actions.add_parser(
        "pin", help="neither stop it when idle nor evict it, until lifecycle's next start"
    )
    unpin = actions.add_parser("unpin", help="take the pin off")
    for command in (load, unload, pin, unpin):
        command.add_argument("model", metavar="MODEL", help="its name or an alias")
    for command in (listing, load, unload, pin, unpin):
        _json(command)
        _where("lifecycle", command)


def _devices(commands: Any) -> None:
    actions = _noun(commands, "devices", "what models run on: list the devices, take one back, give it back")
    listing = actions.add_parser("list", help="every device: memory, who holds it, what is wrong with it")
    drain = actions.add_parser(
        "drain",
        help="take it back: its servers end when their requests are done, nothing new is placed there",
    )
    undrain = actions.add_parser("undrain", help="give it back")
    for command in (drain, undrain):
        command.add_argument("device", metavar="DEVICE", help="its id or its UUID")
    for command in (listing, drain, undrain):
        _json(command)
        _where("lifecycle", command)


def _footprints(commands: Any) -> None:
    actions = _noun(commands, "footprints", "what servers really take of their cards: list, measure, move")
    listing = actions.add_parser("list", help="all that are kept, and whether they hold as configured now")
    measure = actions.add_parser("measure", help="measure a running server now; takes some seconds")
    export = actions.add_parser("export", help="as JSON, for `footprints import` of another installation")
    importing = actions.add_parser(
        "import", help="take in an export, or the memory_footprints.json of vllm_gateway"
    )
    delete = actions.add_parser("delete", help="forget: the model is measured again at its next start")
    for command in (listing, export):
        command.add_argument("--model", default="", metavar="NAME", help="only this model's")
    for command in (measure, delete):
        command.add_argument("model", metavar="MODEL", help="its name or an alias")
    delete.add_argument("--signature", default="", metavar="HEX", help="only this one, as `list` shows it")
    export.add_argument("--output", metavar="FILE", help="write it there; else it is printed")
    importing.add_argument("file", metavar="FILE", help="- is the standard input")
    for command in (listing, measure, importing, delete):
        _json(command)
    _where("lifecycle", listing, measure, export, importing, delete)


def _explain(commands: Any) -> None:
    text = "what would be done for a model now, and why, in numbers; nothing is done"
    explain = commands.add_parser("explain", help=text, description=text)
    explain.add_argument("model", metavar="MODEL", help="its name or an alias")
    _json(explain)
    _where("lifecycle", explain)


def _events(commands: Any) -> None:
    text = "what has happened to models and their servers, and why"
    events = commands.add_parser("events", help=text, description=text)
    events.add_argument("--model", default="", metavar="NAME", help="only this model's")
    events.add_argument("-f", "--follow", action="store_true", help="go on as they happen, until Ctrl-C")
    events.add_argument(
        "--last", type=_whole(0, 1000), metavar="N", help="begin with the last N, 0 to 1000 (100; 10 with -f)"
    )
    _json(events, "as JSON, one line each")
    _where("lifecycle", events)


def _logs(commands: Any) -> None:
    text = "what a model's server prints"
    logs = commands.add_parser("logs", help=text, description=text)
    logs.add_argument("model", metavar="MODEL", help="its name or an alias")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it prints, until Ctrl-C")
    logs.add_argument(
        "-n", dest="lines", type=_whole(1, 10_000), default=100, metavar="N", help="the last N lines (100)"
    )
    _json(logs, "as JSON, one line each")
    _where("lifecycle", logs)


def _keys(commands: Any) -> None:
    actions = _noun(commands, "keys", "who may ask: make API keys, list them, revoke one")
    create = actions.add_parser("create", help="make a key and print it: it is shown this once")
    create.add_argument("--name", default="", metavar="TEXT", help="for people")
    create.add_argument("--tenant", default="default", metavar="NAME", help="whose share and rates count")
    models = "a model that it may use, by name or alias; again for more (all)"
    create.add_argument("--model", default=[], action="append", metavar="NAME", help=models)
    scopes = "inference or operator; again for both (inference)"
    create.add_argument("--scope", default=[], action="append", metavar="SCOPE", help=scopes)
    create.add_argument("--act-as", action="store_true", help="it may name a tenant and a priority by header")
    create.add_argument("--expires", metavar="DURATION", help="such as 30d (never)")
    listing = actions.add_parser("list", help="all keys: what they begin with, never the keys themselves")
    revoke = actions.add_parser("revoke", help="refuse a key from now on")
    revoke.add_argument("key", metavar="ID", help="as `keys list` shows it")
    for command in (create, listing, revoke):
        _json(command)
        command.add_argument("--config", metavar="FILE", required=True, help="names the file: edge.keys_file")


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A number of an option, with its range in the error."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give {low} to {high}")
        return int(text)

    return parse


def _noun(commands: Any, name: str, text: str) -> Any:
    """A command that has actions; returns what they are added to."""
    return commands.add_parser(name, help=text).add_subparsers(dest="action", required=True, metavar="ACTION")


def _json(command: Parser, text: str = "as JSON") -> None:
    command.add_argument("--json", action="store_true", help=text)


def _where(service: str, *commands: Parser) -> None:
    """The options that say which service is asked."""
    for command in commands:
        command.add_argument("--config", metavar="FILE", help="the configuration file of what runs")
        command.add_argument(
            "--address", metavar="ADDRESS", help=f"{service}'s host:port or unix:/path, instead of the file's"
        )
