"""What to start, drain and stop: `plan(world, now) → Plan`. Pure: the same world gives the same plan.

The reconciler carries the actions out and passes the intents in again with the next world. A dry run is
the same call on a world in which the model was ordered (`explain`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tidegate_lifecycle.budget import Intent, Ledger
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.instance import DrainCause, Instance, InstanceState
from tidegate_lifecycle.placing import (
    Chosen,
    choose_free,
    choose_victims,
    describe,
    device_lines,
    groups,
    too_large,
)
from tidegate_lifecycle.world import (
    SCALE_OUT_WAIT,
    STOP_TIME,
    Action,
    Demand,
    Plan,
    Start,
    StartDrain,
    Stop,
    Undrain,
    Wait,
    WaitReason,
    World,
)


def plan(world: World, now: float) -> Plan:
    """The plan for this world.

    1. Intents that were begun are kept while their beneficiary is wanted, may start, and has no server.
    2. Drains: returned when their reason has gone; stopped when empty, or past the deadline.
    3. Models without a server, in turn: begun intents, `always_on`, the oldest ticket, orders, interest.
       Each is started, or gets room made, or waits with a reason (`_place`).
    4. One more instance for tickets that wait beside busy ones, in free memory only.
    5. Idle, unloaded and replaced ones begin to drain, those on a device that an operator has taken back, and
       the youngest of a model that has more than its `instances`.
    6. Victims whose beneficiary found room elsewhere in this very plan return.
    While admission is away or unsettled, the stops of 2, the evictions of 3, and 5 are left out.
    """
    return _Planner(world, now).run()


def explain(world: World, model: str, now: float) -> tuple[Plan, tuple[str, ...]]:
    """The dry run: the plan if the model were ordered now, and a line for each card of its pool."""
    trial = dataclasses.replace(world, ordered=world.ordered | {model})
    lines = device_lines(world.need(world.catalog[model]), Ledger(world.cards, world.instances), now)
    return plan(trial, now), lines


class _Planner:
    def __init__(self, world: World, now: float) -> None:
        self.world, self.now = world, now
        self.ledger = Ledger(world.cards, world.instances)
        self.actions: list[Action] = []
        self.waits: dict[str, Wait] = {}
        self.wake_at = math.inf
        self.returned: set[str] = set()
        """Models of which this plan takes a draining server back."""
        self.of: dict[str, list[Instance]] = {}
        for item in world.instances:
            self.of.setdefault(item.model, []).append(item)

    def run(self) -> Plan:
        self._keep_intents()  # 1
        for item in self.world.instances:  # 2
            if item.state is InstanceState.DRAINING:
                self._continue_drain(item)
        for model in self._turns():  # 3
            self._place(model)
        for model in self.world.catalog.values():  # 4
            self._scale_out(model)
        for item in self.world.instances if self.world.settled else ():  # 5
            if not self._clear_device(item):
                self._end_idle(item)
        for model in self.world.catalog.values() if self.world.settled else ():  # 5
            self._end_surplus(model)
        for model in self.world.catalog.values():
            if not model.external and not groups(self.world.need(model), self.ledger.cards.values()):
                self._wait(model, WaitReason.NEVER_FITS)  # said before anybody asks: refused at once
        self._return_the_spared()  # 6
        intents = tuple(self.ledger.intents.values())
        return Plan(tuple(self.actions), intents, dict(self.waits), self.wake_at)

    # -- what is known -----------------------------------------------------------------------------

    def demand(self, model: str) -> Demand:
        return self.world.demand.get(model, Demand())

    def serving(self, model: str) -> list[Instance]:
        return [item for item in self.of.get(model, ()) if item.serving]

    def wanted(self, model: Model) -> bool:
        """Somebody wants it to run: tickets, an interest, an order, or its setting."""
        demand = self.demand(model.name)
        asked = demand.waiting > 0 or demand.interest_until > self.now
        return asked or model.name in self.world.ordered or model.always_on

    def keeps_room(self, item: Instance) -> bool:
        """Never evicted, never idle-stopped."""
        entry = self.world.catalog.get(item.model)
        return item.model in self.world.pinned or (entry is not None and entry.always_on)

    def wake(self, at: float) -> None:
        """Plan again at that time, if it is still to come."""
        if at > self.now:
            self.wake_at = min(self.wake_at, at)

    def backing_off(self, model: str) -> bool:
        circuit = self.world.circuits.get(model)
        if circuit is not None:
            self.wake(circuit.retry_at)
        return circuit is not None and circuit.is_open(self.now)

    def idle(self, item: Instance) -> bool:
        """Ready, seen so by admission, and used by nobody: waiting for nothing would only add to the other's
        wait."""
        demand = self.demand(item.model)
        used = item.leases or item.running or demand.waiting or demand.interest_until > self.now
        return item.state is InstanceState.READY and self.world.seen >= item.generation and not used

    def fresh(self, item: Instance) -> bool:
        """It has just become ready, and tickets that waited for it haven't been granted and aren't gone.

        Without this the other model's waiter evicts it before its own were served, over and over.
        """
        if item.ready_at is None or self.world.seen < item.generation:
            return True
        return self.demand(item.model).oldest_since <= item.ready_at

    # -- 1, 2 and 6: what is under way -------------------------------------------------------------

    def _keep_intents(self) -> None:
        present = {item.id for item in self.world.instances if item.exists}
        for intent in self.world.intents:
            model = self.world.catalog.get(intent.model)
            cards_exist = all(card in self.ledger.cards for card in intent.devices)
            if not intent.begun or model is None or not cards_exist or not self.wanted(model):
                continue
            if self.backing_off(model.name) or self.serving(model.name):
                continue
            victims = tuple(victim for victim in intent.victims if victim in present)
            self.ledger.intents[model.name] = dataclasses.replace(intent, victims=victims)

    def _spared(self, item: Instance) -> bool:
        """It drains for another model, which doesn't need its room (any more)."""
        if item.replaced or item.drain is None or item.drain.cause is not DrainCause.EVICTION:
            return False
        intent = self.ledger.intents.get(item.drain.beneficiary)
        return intent is None or item.id not in intent.victims

    def _continue_drain(self, item: Instance) -> None:
        drain, demand = item.drain, self.demand(item.model)
        assert drain is not None, item
        wanted_again = demand.waiting > 0 or demand.interest_until > self.now
        kept = self.keeps_room(item) and drain.cause in (DrainCause.IDLE, DrainCause.EVICTION)
        used = drain.cause is DrainCause.IDLE and (wanted_again or item.leases > 0)
        back = drain.cause in (DrainCause.DEVICE, DrainCause.RELOAD)  # the device, or the configuration, is
        obsolete = self._spared(item) or kept or used or back
        if obsolete and not item.replaced and not self._taken(item):
            self.actions.append(Undrain(item.id))
            self.returned.add(item.model)
            return
        empty = item.drained(self.world.seen)
        cut_at = item.cut_at
        overdue = cut_at is not None and cut_at <= self.now
        if self.world.settled and (empty or overdue):
            if any(self.ledger.stop_gated(card) for card in item.devices):
                return
            self.actions.append(Stop(item.id, cut=not empty))
            self.ledger.changing.update(item.devices)
        elif cut_at is not None:
            self.wake(cut_at)

    def _return_the_spared(self) -> None:
        told = {action.instance_id for action in self.actions if isinstance(action, Undrain | Stop)}
        for item in self.world.instances:
            draining = item.state is InstanceState.DRAINING and not self._taken(item)
            if draining and item.id not in told and self._spared(item):
                self.actions.append(Undrain(item.id))

    # -- 3: models without a server ----------------------------------------------------------------

    def _turns(self) -> list[Model]:
        wanting = [
            model
            for model in self.world.catalog.values()
            if not model.external
            and self.wanted(model)
            and not self.serving(model.name)
            and model.name not in self.returned
        ]

        def turn(model: Model) -> tuple[bool, bool, float, bool, str]:
            intent = self.ledger.intents.get(model.name)
            ordered = model.name in self.world.ordered
            oldest = self.demand(model.name).oldest_since
            return intent is None or not intent.begun, not model.always_on, oldest, not ordered, model.name

        return sorted(wanting, key=turn)

    def _place(self, model: Model) -> None:
        """One model's turn.

        0. What it needs is being read from its files: it waits for that, seconds at most.
        1. Larger than any card's budget: never; nothing is evicted for it.
        2. In back-off: it waits; an `always_on` one keeps its room.
        3. It fits now: it starts, unless another server starts or stops there (the card gate).
        4. A server of its former configuration is still there: that one makes room, and no other model.
        5. Its intent was begun: it waits for the rest of its victims.
        6. Even without all that may go there is no room: no capacity.
        7. Others must go: they are told when their shield is over; until then the room is claimed.
        """
        if self.world.need(model).pending:  # 0
            self._wait(model, WaitReason.ESTIMATING)
            return
        if not groups(self.world.need(model), self.ledger.cards.values()):  # 1
            self._wait(model, WaitReason.NEVER_FITS)
            return
        chosen = choose_free(self.world.need(model), self.ledger)
        if self.backing_off(model.name):  # 2
            if model.always_on and chosen is not None:
                self.ledger.intents[model.name] = chosen.intent(model.name, begun=False)
            self._wait(model, WaitReason.BACK_OFF)
        elif chosen is not None:  # 3
            self._start(model, chosen)
        elif any(item.replaced for item in self.of.get(model.name, ())):  # 4
            self._wait(model, WaitReason.ROOM)
        elif self._underway(model):  # 5
            self._wait(model, WaitReason.ROOM, self._bound(model, self.ledger.intents[model.name], self.now))
        elif choose_victims(self.world.need(model), self.ledger, self.idle, self._movable) is None:  # 6
            # Room that is claimed for others, or given to one in this very plan, comes free again in turn.
            ledger = self.ledger
            held = any(ledger.claimed(card, model.name) or ledger.started[card] for card in ledger.cards)
            self._wait(model, WaitReason.ROOM if held else WaitReason.NO_CAPACITY)
        else:  # 7
            self._make_room(model)

    def _underway(self, model: Model) -> bool:
        """Its begun intent makes enough room; one that won't (others took memory meanwhile) is dropped.

        Its victims may all have gone, and their memory not have been seen free yet.
        """
        intent = self.ledger.intents.get(model.name)
        if intent is None:
            return False
        settling = self._settling(intent)
        closed = any(self.ledger.cards[card].closed for card in intent.devices)
        if (intent.victims or settling) and not closed and self.ledger.suffices(intent):
            return True
        del self.ledger.intents[model.name]
        return False

    def _settling(self, intent: Intent) -> bool:
        return any(self.ledger.cards[card].settling_mib for card in intent.devices)

    def _start(self, model: Model, chosen: Chosen) -> None:
        if any(self.ledger.gated(card) for card in chosen.devices):
            self.ledger.intents[model.name] = chosen.intent(model.name, begun=False)
            self._wait(model, WaitReason.GATE, self._bound(model, self.ledger.intents[model.name], self.now))
            return
        self.ledger.intents.pop(model.name, None)
        self._order(model, chosen)

    def _order(self, model: Model, chosen: Chosen) -> None:
        for spot in chosen.spots:
            self.ledger.started[spot.card.id] += spot.need
            self.ledger.changing.add(spot.card.id)
        self.actions.append(Start(model.name, chosen.devices, min(spot.need for spot in chosen.spots)))

    def _make_room(self, model: Model) -> None:
        demand = self.demand(model.name)
        # Only tickets push a busy model out; and never for a model that is unproven.
        circuit = self.world.circuits.get(model.name)
        gentle = not demand.waiting or circuit is not None

        def free_at(item: Instance) -> float | None:
            if self._movable(item) is None:
                return None
            if self.idle(item) and not self.fresh(item):
                return -math.inf
            return None if gentle else self._shield(item, demand.oldest_since)

        chosen = choose_victims(
            self.world.need(model), self.ledger, lambda item: free_at(item) == -math.inf, free_at
        )
        if chosen is None:
            self._wait(model, WaitReason.ROOM)
            return
        gated = any(self.ledger.gated(card) for card in chosen.devices)
        intent = chosen.intent(model.name, begun=False)
        due = self.world.settled and not gated and chosen.free_at <= self.now
        # A drain that doesn't suffice would be taken back by the next plan.
        begin = due and bool(chosen.victims) and self.ledger.suffices(intent)
        intent = dataclasses.replace(intent, begun=begin)
        self.ledger.intents[model.name] = intent
        if begin:
            need = describe(self.world.need(model), self.ledger, self.now).split(";", 1)[0]
            for victim in chosen.victims:
                reason = f"makes room for {model.name}, which {need}"
                self.actions.append(StartDrain(victim.id, DrainCause.EVICTION, reason, model.name))
        else:
            self.wake(chosen.free_at)
        self._wait(model, WaitReason.ROOM, self._bound(model, intent, max(self.now, chosen.free_at)))

    def _movable(self, item: Instance) -> float | None:
        """Whether it can ever be made to go for another model."""
        return None if self.keeps_room(item) else math.inf

    def _shield(self, item: Instance, oldest: float) -> float:
        """When a busy instance may be told to drain for a model whose oldest ticket waits since `oldest`.

        The wait counts from the ticket, or from the resident's readiness (the start of its turn) if later.
        A fresh one, or one within its residency, is shielded until then and no longer.
        """
        if item.ready_at is None or item.state is not InstanceState.READY:
            return math.inf
        turn_over = max(oldest, item.ready_at) + self.world.policy.max_swap_wait
        if self.fresh(item):
            return turn_over
        residency = max(self.world.policy.min_residency, 2 * self.world.load_times.get(item.model, 0.0))
        return min(turn_over, item.ready_at + residency)

    def _bound(self, model: Model, intent: Intent, begins: float) -> float | None:
        """Seconds until it serves at the latest: what is before it on its cards, drain, stop and load."""
        load = self.world.load_times.get(model.name)
        if load is None or math.isinf(begins):
            return None
        before = [
            self.waits[other.model].ready_in
            for other in self.ledger.intents.values()
            if other.model in self.waits
            and other.model != model.name
            and set(other.devices) & set(intent.devices)
        ]
        starting = [
            self._load_left(item)
            for item in self.world.instances
            if item.state is InstanceState.STARTING and set(item.devices) & set(intent.devices)
        ]
        drains = [self._drain_left(item) for item in self.world.instances if item.id in intent.victims]
        ahead, loading, drain = _longest(before), _longest(starting), _longest(drains)
        if ahead is None or loading is None or drain is None:
            return None
        wait = max(0.0, begins - self.now) + loading + drain
        return ahead + wait + (STOP_TIME if intent.victims or self._settling(intent) else 0.0) + load

    def _drain_left(self, victim: Instance) -> float | None:
        """Seconds until a victim is empty at the latest, once it may be told to drain; None = unknown."""
        if victim.state is InstanceState.READY:
            limit = self.world.policy.drain_timeout
            return 0.0 if self.idle(victim) else limit or None
        if victim.drain is None or not (victim.leases or victim.running):
            return 0.0
        return None if victim.drain.deadline is None else max(0.0, victim.drain.deadline - self.now)

    def _load_left(self, item: Instance) -> float | None:
        """Seconds that a start should still take; None = unknown, as when it takes longer than usual."""
        left = self.world.load_times.get(item.model, 0.0) - (self.now - item.loads_since)
        return left if left > 0.0 else None

    def _wait(self, model: Model, reason: WaitReason, ready_in: float | None = None) -> None:
        need = self.world.need(model)
        lines = device_lines(need, self.ledger, self.now)
        never = reason is WaitReason.NEVER_FITS
        text = too_large(need, self.ledger) if never else describe(need, self.ledger, self.now)
        self.waits[model.name] = Wait(reason, text, lines, ready_in)

    # -- 4 and 5 -----------------------------------------------------------------------------------

    def _scale_out(self, model: Model) -> None:
        items = [item for item in self.of.get(model.name, ()) if item.exists]
        demand = self.demand(model.name)
        if model.external or not demand.waiting or not items or len(items) >= model.instances:
            return
        if self.backing_off(model.name) or not all(item.state is InstanceState.READY for item in items):
            return
        newest = max(item.ready_at or 0.0 for item in items)
        due = max(newest, demand.oldest_since) + SCALE_OUT_WAIT
        self.wake(due)
        chosen = choose_free(self.world.need(model), self.ledger)
        gated = chosen is not None and any(self.ledger.gated(card) for card in chosen.devices)
        if due <= self.now and chosen is not None and not gated:
            self._order(model, chosen)

    def _taken(self, item: Instance) -> list[str]:
        """Its devices that an operator has taken back."""
        return [
            card for card in item.devices if card in self.ledger.cards and self.ledger.cards[card].draining
        ]

    def _clear_device(self, item: Instance) -> bool:
        """Begins its drain when its device was taken back; an operator says so, `always_on` or not."""
        taken = self._taken(item) if item.state is InstanceState.READY else []
        if taken:
            reason = f"{', '.join(taken)} was taken back by an operator"
            self.actions.append(StartDrain(item.id, DrainCause.DEVICE, reason))
        return bool(taken)

    def _end_idle(self, item: Instance) -> None:
        model = self.world.catalog.get(item.model)
        if item.state is not InstanceState.READY:
            return
        claimed = any(item.id in intent.victims and intent.begun for intent in self.ledger.intents.values())
        if claimed:
            return
        if item.replaced:
            self.actions.append(StartDrain(item.id, DrainCause.RELOAD, item.replaced))
            return
        if model is not None and model.external:
            return
        if item.model in self.world.unload:
            self.actions.append(StartDrain(item.id, DrainCause.UNLOAD, "an operator unloads it"))
            return
        if model is None or self.keeps_room(item) or not model.idle_timeout or not self.idle(item):
            return
        due = item.last_used + model.idle_timeout
        if due <= self.now:
            reason = f"idle for {self.now - item.last_used:.0f} s"
            self.actions.append(StartDrain(item.id, DrainCause.IDLE, reason))
        self.wake(due)

    def _end_surplus(self, model: Model) -> None:
        """A restart may have found more than `instances`: one was draining when another one was started."""
        serving = [] if model.external else self.serving(model.name)
        told = {action.instance_id for action in self.actions if isinstance(action, StartDrain)}
        for item in sorted(serving, key=lambda item: item.ordered_at)[model.instances :]:
            if item.state is InstanceState.READY and item.id not in told:
                reason = f"there are more than its `instances` ({model.instances})"
                self.actions.append(StartDrain(item.id, DrainCause.SURPLUS, reason))


def _longest(bounds: Sequence[float | None]) -> float | None:
    """The longest of some seconds, 0 without any; None when one of them is unknown."""
    known = [bound for bound in bounds if bound is not None]
    return max(known, default=0.0) if len(known) == len(bounds) else None
