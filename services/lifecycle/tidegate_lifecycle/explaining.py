"""The dry run: what would be done if a model were ordered now, and why, in words and numbers. Pure."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from tidegate_lifecycle.budget import Ledger
from tidegate_lifecycle.describing import Words
from tidegate_lifecycle.needs import Need
from tidegate_lifecycle.placing import Places
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.victims import Victims
from tidegate_lifecycle.world import Plan, Start, StartDrain, Stop, Wait, WaitReason, World


@dataclass(frozen=True)
class Explained:
    """The answer for one model."""

    plan: Plan
    needs: str
    """What it needs, and from where that is known."""
    steps: tuple[str, ...]
    """What would be done now, in this order."""
    problem: str
    """Why it wouldn't be started now; empty = it would, or it runs."""
    devices: tuple[str, ...]
    """Of each device of its pool: what is free, who has the rest, and who of them could go."""


def explain(world: World, model: str, now: float) -> Explained:
    """The plan for the model as if it were ordered now; the numbers are those of now."""
    need = world.need(world.catalog[model])
    words = Words(Places(Ledger(world.cards, world.instances), Victims(world, now)))
    decided = plan(dataclasses.replace(world, ordered=world.ordered | {model}), now)
    wait = decided.waits.get(model)
    problem = "" if wait is None else _problem(world, words, need, wait)
    return Explained(
        decided, words.needs(need), _steps(world, words, decided, model), problem, words.lines(need)
    )


def _steps(world: World, words: Words, decided: Plan, model: str) -> tuple[str, ...]:
    held = {item.id: item for item in world.instances}
    steps = []
    for action in decided.actions:
        if isinstance(action, Start) and action.model == model:
            steps.append(f"start {action.reason}")
        elif isinstance(action, StartDrain) and action.beneficiary == model:
            item = held[action.instance_id]
            steps.append(f"drain and stop {item.id} on {', '.join(item.devices)} ({words.holder(item)})")
        elif isinstance(action, Stop):
            item = held[action.instance_id]
            cut = ", and end what still runs on it" if action.cut else ""
            steps.append(f"stop {item.id} on {', '.join(item.devices)}{cut}")
    return tuple(steps)


def _problem(world: World, words: Words, need: Need, wait: Wait) -> str:
    if wait.reason is WaitReason.NEVER_FITS:
        return f"it can never fit: {words.too_large(need)}"
    if wait.reason is WaitReason.BACK_OFF:
        circuit = world.circuits[need.model]
        left = max(0.0, circuit.retry_at - words.victims.now)
        return f"its last start failed, the next try is in {math.ceil(left)} s: {circuit.message}"
    why = {
        WaitReason.GATE: "there is room, but another server starts or stops on those devices",
        WaitReason.ROOM: "others must go first",
        WaitReason.NO_CAPACITY: "there is no room, and what holds it can't be made to go",
    }[wait.reason]
    bound = "" if wait.ready_in is None else f"; it serves within {math.ceil(wait.ready_in)} s"
    return f"{words.needs(need)}; {why}{bound}"
