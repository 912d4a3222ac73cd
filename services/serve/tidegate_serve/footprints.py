"""`tidegate footprints list|measure|export|import|delete`: what model servers really take of their cards."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from grpc import aio

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis.plain import as_dict
from tidegate_serve import operate
from tidegate_serve.operate import LIFECYCLE, Failed, ask, duration, show, size, table

MEASURE = 900.0
"""Seconds in which a measurement must end: more than lifecycle.footprints' defaults can take."""
LARGEST = 3 * 2**20
"""Bytes of a file to import: what one message may hold."""


def run(arguments: argparse.Namespace) -> int:
    """Carries out one command; returns the exit status."""
    commands = {
        "list": _list,
        "measure": _measure,
        "export": _export,
        "import": _import,
        "delete": _delete,
    }
    return operate.run(arguments, LIFECYCLE, commands[arguments.action])


async def _list(stub: Any, arguments: argparse.Namespace) -> None:
    request = pb.ListFootprintsRequest(model=arguments.model)
    show(arguments, await ask(stub.ListFootprints, request), footprints_table)


async def _measure(stub: Any, arguments: argparse.Namespace) -> None:
    request = pb.MeasureFootprintRequest(model=arguments.model)
    try:
        answer = await stub.MeasureFootprint(request, timeout=MEASURE)
    except aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        raise Failed(f"{arguments.model} was not measured within {MEASURE / 60:g} min") from None
    show(arguments, answer.footprint, _sentence)


async def _export(stub: Any, arguments: argparse.Namespace) -> None:
    answer = await ask(stub.ListFootprints, pb.ListFootprintsRequest(model=arguments.model))
    text = json.dumps(as_dict(answer), indent=2)
    if arguments.output is None:
        print(text)
        return
    path = Path(arguments.output)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(f"{text}\n")
        new.replace(path)
    except OSError as error:
        raise Failed(f"{path} can't be written: {error.strerror}") from None
    print(f"{len(answer.footprints)} footprints are in {path}", file=sys.stderr)


async def _import(stub: Any, arguments: argparse.Namespace) -> None:
    answer = await ask(stub.ImportFootprints, _request(_content(arguments.file), arguments.file))
    show(arguments, answer, _imported)
    if answer.left_out and not answer.imported:
        raise Failed("nothing was imported")


async def _delete(stub: Any, arguments: argparse.Namespace) -> None:
    request = pb.DeleteFootprintRequest(model=arguments.model, signature=arguments.signature)
    show(arguments, await ask(stub.DeleteFootprint, request), lambda answer: f"{answer.deleted} deleted")


def _content(file: str) -> str:
    """What a file, or with `-` the standard input, holds."""
    try:
        content = (
            sys.stdin.buffer.read(LARGEST + 1) if file == "-" else Path(file).read_bytes()[: LARGEST + 1]
        )
        if len(content) > LARGEST:
            raise Failed(f"{file} is larger than {LARGEST // 2**20} MiB")
        return content.decode()
    except OSError as error:
        raise Failed(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Failed(f"{file} is no JSON: it isn't even text") from None


def _request(text: str, file: str) -> pb.ImportFootprintsRequest:
    """1. what `footprints export` wrote; 2. a memory_footprints.json: lifecycle reads it."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Failed(f"{file} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise Failed(f"{file} holds neither footprints nor records of a memory_footprints.json")
    if not isinstance(document.get("footprints"), list):  # 2
        return pb.ImportFootprintsRequest(memory_footprints_json=text)
    request = pb.ImportFootprintsRequest()
    for number, item in enumerate(document["footprints"]):  # 1
        try:
            json_format.ParseDict(item, request.footprints.add())
        except (json_format.ParseError, TypeError, AttributeError) as error:
            raise Failed(f"{file}: footprints.{number}: {error}") from None
    return request


def footprints_table(answer: pb.ListFootprintsResponse) -> str:
    """By model, the newest first; `-` under NOW = it was measured under another configuration."""
    if not answer.footprints:
        return "no footprints"
    rows = [("MODEL", "CARDS", "TAKES", "RESERVES", "CONFIDENCE", "SOURCE", "AGE", "NOW", "SIGNATURE")]
    for item in answer.footprints:
        cards = f"{item.device_count} x {item.card or '?'}"
        sizes = size(item.mib_per_device), size(item.reserve_mib)
        now = "yes" if item.current else "-"
        sure = f"{item.confidence:.2f}"
        rows.append(
            (item.model, cards, *sizes, sure, item.source, duration(item.age_ms), now, item.signature)
        )
    return table(rows)


def _sentence(item: pb.Footprint) -> str:
    each = f" of each of {item.device_count} cards" if item.device_count > 1 else ""
    sure = f"{item.samples} samples, confidence {item.confidence:.2f}"
    return (
        f"{item.model} takes {size(item.mib_per_device)}{each} ({sure}); later starts reserve "
        f"{size(item.reserve_mib)}"
    )


def _imported(answer: pb.ImportFootprintsResponse) -> str:
    return "\n".join([f"{answer.imported} imported", *(f"left out: {text}" for text in answer.left_out)])
