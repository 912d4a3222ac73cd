"""What to start, drain and stop: `plan(world, now) → Plan`. Pure: the same world gives the same plan.

The reconciler carries the actions out and passes the intents in again with the next world. Where a server
could go is looked for in `placing.py`, who may be made to go for it is judged in `victims.py`, how long that
takes in `bounds.py`; `describing.py` has the words. A dry run is a plan for a world in which the model was
ordered (`explaining.py`).
"""

from __future__ import annotations

import dataclasses
import math

from tidegate_lifecycle.bounds import bound
from tidegate_lifecycle.budget import Intent, Ledger
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.describing import Words, placed
from tidegate_lifecycle.instance import DrainCause, Instance, InstanceState
from tidegate_lifecycle.needs import Need
from tidegate_lifecycle.placing import Chosen, Places
from tidegate_lifecycle.victims import Victims
from tidegate_lifecycle.world import (
    SCALE_OUT_WAIT,
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


class _Planner:
    def __init__(self, world: World, now: float) -> None:
        self.world, self.now = world, now
        self.ledger = Ledger(world.cards, world.instances)
        self.victims = Victims(world, now)
        self.places = Places(self.ledger, self.victims)
        self.actions: list[Action] = []
        self.waits: dict[str, tuple[WaitReason, float | None]] = {}
        """Why a model waits, and the bound of its turn in seconds."""
        self.wake_at = math.inf
        self.returned: set[str] = set()
        """Models of which this plan takes a draining server back."""
        self.of: dict[str, list[Instance]] = {}
        for item in world.instances:
            self.of.setdefault(item.model, []).append(item)
        self.needs = {model.name: world.need(model) for model in world.catalog.values() if not model.external}

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
        for name, need in self.needs.items():
            if not need.pending and not self.places.groups(need):  # said before anybody asks
                self.waits[name] = WaitReason.NEVER_FITS, None
        self._return_the_spared()  # 6
        intents = tuple(self.ledger.intents.values())
        return Plan(tuple(self.actions), intents, self._said(), self.wake_at)

    def _said(self) -> dict[str, Wait]:
        """The waits in words: what there was when all was decided."""
        words, said = Words(self.places), {}
        for model, (reason, ready_in) in self.waits.items():
            never, need = reason is WaitReason.NEVER_FITS, self.needs[model]
            said[model] = Wait(reason, words.too_large(need) if never else words.no_room(need), ready_in)
        return said

    # -- what is known -----------------------------------------------------------------------------

    def demand(self, model: str) -> Demand:
        return self.victims.demand(model)

    def serving(self, model: str) -> list[Instance]:
        return [item for item in self.of.get(model, ()) if item.serving]

    def wanted(self, model: Model) -> bool:
        """Somebody wants it to run: tickets, an interest, an order, or its setting."""
        demand = self.demand(model.name)
        asked = demand.waiting > 0 or demand.interest_until > self.now
        return asked or model.name in self.world.ordered or model.always_on

    def wake(self, at: float) -> None:
        """Plan again at that time, if it is still to come."""
        if at > self.now:
            self.wake_at = min(self.wake_at, at)

    def backing_off(self, model: str) -> bool:
        circuit = self.world.circuits.get(model)
        if circuit is not None:
            self.wake(circuit.retry_at)
        return circuit is not None and circuit.is_open(self.now)

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
            self.ledger.claim(dataclasses.replace(intent, victims=victims))

    def _spared(self, item: Instance) -> bool:
        """It drains for another model, and nobody needs its room (any more)."""
        if item.replaced or item.drain is None or item.drain.cause is not DrainCause.EVICTION:
            return False
        return not self.ledger.makes_room(item.id, "")

    def _continue_drain(self, item: Instance) -> None:
        drain, demand = item.drain, self.demand(item.model)
        assert drain is not None, item
        wanted_again = demand.waiting > 0 or demand.interest_until > self.now
        kept = self.victims.keeps_room(item) and drain.cause in (DrainCause.IDLE, DrainCause.EVICTION)
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
            self.ledger.stop(item.devices)
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
        need = self.needs[model.name]
        if need.pending:  # 0
            self.waits[model.name] = WaitReason.ESTIMATING, None
            return
        if not self.places.groups(need):  # 1
            self.waits[model.name] = WaitReason.NEVER_FITS, None
            return
        chosen = self.places.free(need)
        if self.backing_off(model.name):  # 2
            if model.always_on and chosen is not None:
                self.ledger.claim(chosen.intent(model.name, begun=False))
            self.waits[model.name] = WaitReason.BACK_OFF, None
        elif chosen is not None:  # 3
            self._start(model, chosen)
        elif any(item.replaced for item in self.of.get(model.name, ())):  # 4
            self.waits[model.name] = WaitReason.ROOM, None
        elif self._underway(model):  # 5
            self._wait(WaitReason.ROOM, self.ledger.intents[model.name], self.now)
        elif not self.places.conceivable(need):  # 6
            # Room that is claimed for others, or given to one in this very plan, comes free again in turn.
            ledger = self.ledger
            held = any(ledger.claimed(card, model.name) or ledger.started[card] for card in ledger.cards)
            self.waits[model.name] = WaitReason.ROOM if held else WaitReason.NO_CAPACITY, None
        else:  # 7
            self._make_room(model, need)

    def _underway(self, model: Model) -> bool:
        """Its begun intent makes enough room; one that won't (others took memory meanwhile) is dropped.

        Its victims may all have gone, and their memory not have been seen free yet.
        """
        intent = self.ledger.intents.get(model.name)
        if intent is None:
            return False
        cards = [self.ledger.cards[card] for card in intent.devices]
        settling, closed = any(card.settling_mib for card in cards), any(card.closed for card in cards)
        if (intent.victims or settling) and not closed and self.ledger.suffices(intent):
            return True
        self.ledger.drop(model.name)
        return False

    def _start(self, model: Model, chosen: Chosen) -> None:
        if any(self.ledger.gated(card) for card in chosen.devices):
            intent = chosen.intent(model.name, begun=False)
            self.ledger.claim(intent)
            self._wait(WaitReason.GATE, intent, self.now)
            return
        self.ledger.drop(model.name)
        self._order(model, chosen)

    def _order(self, model: Model, chosen: Chosen) -> None:
        for spot in chosen.spots:
            self.ledger.start(spot.card.id, spot.need)
        needs = Words(self.places).needs(self.needs[model.name])
        reason = placed(needs, [(spot.card.id, spot.left) for spot in chosen.spots])
        mib = min(spot.need for spot in chosen.spots)
        self.actions.append(Start(model.name, chosen.devices, mib, reason))

    def _make_room(self, model: Model, need: Need) -> None:
        demand = self.demand(model.name)
        # Only tickets push a busy model out; and never for a model that is unproven.
        gentle = not demand.waiting or self.world.circuits.get(model.name) is not None
        chosen = self.places.made(need, None if gentle else demand.oldest_since)
        if chosen is None:
            self.waits[model.name] = WaitReason.ROOM, None
            return
        gated = any(self.ledger.gated(card) for card in chosen.devices)
        intent = self._with_spared(chosen.intent(model.name, begun=False))
        due = self.world.settled and not gated and chosen.free_at <= self.now
        told = not chosen.victims  # who drains for it was told when it drained for another model
        # A drain that doesn't suffice would be taken back by the next plan.
        begin = (due or told) and bool(intent.victims) and self.ledger.suffices(intent)
        intent = dataclasses.replace(intent, begun=begin)
        if begin:
            needs = Words(self.places).needs(need)
            for victim in chosen.victims:
                reason = f"makes room for {model.name}, which {needs}"
                self.actions.append(StartDrain(victim.id, DrainCause.EVICTION, reason, model.name))
        else:
            self.wake(chosen.free_at)
        self.ledger.claim(intent)
        self._wait(WaitReason.ROOM, intent, max(self.now, chosen.free_at))

    def _with_spared(self, intent: Intent) -> Intent:
        """With those on its cards that drain, and for nobody any more: it counts on their room, so they are
        its victims. Taken back, they would be told to go again, and that by turns without end."""
        if self.ledger.suffices(intent):
            return intent
        spared = [
            item.id
            for card in intent.devices
            for item in self.ledger.on[card]
            if item.state is InstanceState.DRAINING and item.model not in self.returned and self._spared(item)
        ]
        return dataclasses.replace(intent, victims=(*intent.victims, *dict.fromkeys(spared)))

    def _wait(self, reason: WaitReason, intent: Intent, begins: float) -> None:
        """It waits for the room of its intent, whose victims are told at `begins`."""
        ahead = [
            self.waits[other.model][1]
            for other in self.ledger.intents.values()
            if other.model in self.waits
            and other.model != intent.model
            and not set(other.devices).isdisjoint(intent.devices)
        ]
        starts = [action for action in self.actions if isinstance(action, Start)]
        left = bound(self.world, self.victims, intent, begins, ahead, starts)
        self.waits[intent.model] = reason, left

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
        chosen = self.places.free(self.needs[model.name])
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
        if (
            model is None
            or self.victims.keeps_room(item)
            or not model.idle_timeout
            or not self.victims.idle(item)
        ):
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
