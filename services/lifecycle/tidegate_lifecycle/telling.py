"""What others have been told of the fleet: a view of each model, since which generation; and the gauges."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tidegate_lifecycle import metrics
from tidegate_lifecycle.budget import Ledger
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.supply import ModelView, farewell, view

if TYPE_CHECKING:
    from tidegate_lifecycle.catalog import Model
    from tidegate_lifecycle.fleet import Fleet


class Told:
    """Made anew from the fleet after each of the reconciler's turns; what has changed is passed on."""

    def __init__(self) -> None:
        self.generation = 1
        """The count of supply."""
        self.views: dict[str, ModelView] = {}
        self.changed_at: dict[str, int] = {}
        """The generation that tells a model's view."""
        self.removed_at: dict[str, int] = {}
        """The generation that tells that a model is in the catalogue no more."""
        self._catalog = 1
        """The generation of the catalogue that was told."""
        self._measured: dict[tuple[str, InstanceState], int] = {}
        """What the gauge says: instances by model and state."""

    def publish(self, fleet: Fleet, now: float) -> None:
        """Compares each model's view with the last one; a new generation when any differs."""
        of: dict[str, list[Instance]] = {}
        for instance in fleet.instances.values():
            of.setdefault(instance.model, []).append(instance)
        renewed = self._catalog != fleet.config.generation
        self._catalog = fleet.config.generation
        left = self._drop_removed(fleet, of)
        changed = self._changed(fleet, of, now)
        if changed or renewed or left:
            self.generation += 1
            self.changed_at.update(dict.fromkeys(changed, self.generation))
            for instance in itertools.chain.from_iterable(of.get(name, ()) for name in changed):
                instance.generation = instance.generation or self.generation
        stream = fleet.link.stream
        if stream is not None and (changed or renewed or left or stream.sent < 0):
            shapes = any(
                old is None or _shape(old) != _shape(self.views[name]) for name, old in changed.items()
            )
            stream.mark(shapes or renewed or left or stream.sent < 0)
        if any(old is None or old.state != self.views[name].state for name, old in changed.items()):
            for watcher in fleet.catalog_watchers:
                watcher.set()
        self._measure(fleet)

    def _changed(
        self, fleet: Fleet, of: Mapping[str, Sequence[Instance]], now: float
    ) -> dict[str, ModelView | None]:
        """The models whose view is a new one, each with the old one."""
        changed = {}
        for name, model in {**fleet.catalog.models, **fleet.leaving}.items():
            new, old = self._view(fleet, model, of.get(name, ()), now), self.views.get(name)
            if new != old:
                changed[name] = old
                self.views[name] = new
        return changed

    def _view(self, fleet: Fleet, model: Model, instances: Sequence[Instance], now: float) -> ModelView:
        load_time = fleet.load_times.get(model.name)
        told = view(
            model,
            instances,
            fleet.waits.get(model.name),
            fleet.circuits.known.get(model.name),
            fleet.unhealthy.get(model.name, ""),
            load_time,
            now,
        )
        told = fleet.fetches.shown(told, instances, load_time)
        return farewell(told) if model.name in fleet.leaving else told

    def _drop_removed(self, fleet: Fleet, of: Mapping[str, Sequence[Instance]]) -> bool:
        """Models that were taken out of the catalogue and have no server any more: whether there were any."""
        left = [name for name in fleet.leaving if name not in of]
        back = self.removed_at.keys() & fleet.catalog.models.keys()
        self.removed_at = {name: at for name, at in self.removed_at.items() if name not in back}
        for name in left:
            del fleet.leaving[name]
            self.views.pop(name, None)
            self.changed_at.pop(name, None)
            self.removed_at[name] = self.generation + 1
            for state in InstanceState:
                self._measured.pop((name, state), None)
                metrics.INSTANCES.remove_by_labels({"model": name, "state": state.name.lower()})
        return bool(left)

    def _measure(self, fleet: Fleet) -> None:
        metrics.ADMISSION_CONNECTED.set(1 if fleet.link.connected else 0)
        counts = Counter((item.model, item.state) for item in fleet.instances.values())
        for key in itertools.product(fleet.catalog.models, InstanceState):
            if key[1] is not InstanceState.GONE and self._measured.get(key) != counts[key]:
                self._measured[key] = counts[key]
                metrics.INSTANCES.labels(key[0], key[1].name.lower()).set(counts[key])
        cards = fleet.cards()
        ledger = Ledger(cards, fleet.instances.values())
        for card in cards:
            metrics.DEVICE_SETTLING.labels(card.id).set(card.settling_mib * 2**20)
            metrics.DEVICE_BUDGET.labels(card.id).set(card.budget_mib * 2**20)
            metrics.DEVICE_RESERVED.labels(card.id).set(ledger.reserved(card.id) * 2**20)
            metrics.DEVICE_FOREIGN.labels(card.id).set(card.foreign_mib * 2**20)


def _shape(item: ModelView) -> tuple[Any, ...]:
    """What is told at once when it changes: states and reasons, not what servers report of their load."""
    return item.state, item.reason, tuple((one.id, one.state, one.address) for one in item.instances)
