"""`tidegate explain MODEL`: what would be done for a model now, and why, in numbers. Nothing is done."""

from __future__ import annotations

import argparse
from typing import Any

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_serve import operate
from tidegate_serve.operate import LIFECYCLE, ask, show


def run(arguments: argparse.Namespace) -> int:
    """Carries out the command; returns the exit status."""
    return operate.run(arguments, LIFECYCLE, _explain)


async def _explain(stub: Any, arguments: argparse.Namespace) -> None:
    answer = await ask(stub.PlanPlacement, pb.PlanPlacementRequest(model=arguments.model))
    show(arguments, answer, lambda said: placement_text(arguments.model, said))


def placement_text(model: str, answer: pb.PlanPlacementResponse) -> str:
    """The steps in their order, what stands in the way, and what there is on each device."""
    steps = [f"  {number}. {action}" for number, action in enumerate(answer.actions, 1)]
    if steps:
        lines = [f"if {model} were wanted now:", *steps]
    elif not answer.problem:
        lines = [f"{model}: nothing would have to be done"]
    else:
        lines = []
    if answer.problem:
        lines.append(
            f"{model} waits: {answer.problem}" if steps else f"{model} can't be had: {answer.problem}"
        )
    if answer.need and answer.need not in answer.problem:
        lines.append(f"  {answer.need}")
    return "\n".join([*lines, *(f"  {device}" for device in answer.devices)])
