"""What a reload does to the fleet: servers that must go are marked, what is kept of models is cleared up.

Called by the reconciler alone. The plan that follows drains what is marked and starts what is wanted.
"""

from __future__ import annotations

from tidegate_lifecycle import messages as m
from tidegate_lifecycle import metrics
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.engines import shape
from tidegate_lifecycle.fleet import Fleet
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.reload import Changes, compare


def refuse(fleet: Fleet, message: m.ConfigRefused, now: float) -> None:
    """The file can't be used: what was in effect stays so, and that is to be seen."""
    fleet.config.problems = message.problems
    metrics.CONFIG_REFUSED.set(1)
    metrics.CONFIG_READ.labels("refused").inc()
    fleet.events.add(now, "config_refused", message="; ".join(message.problems))


def take(fleet: Fleet, message: m.Reloaded, now: float) -> None:
    """Puts a checked configuration into effect.

    1. The catalogue is replaced, and its count rises, when it differs; times of the policy in any case.
    2. Each instance is judged by the model as it is now: it goes on, or is marked and drains by the plan. One
       that is still starting serves nobody and ends at once.
    3. A model whose server was in use, or is pinned, is started again without waiting for a request.
    4. What was learned of failures under the old configuration is forgotten, and what was ordered for models
       that are gone.
    5. Servers elsewhere that are new are watched.
    """
    if fleet.stopping:
        return
    config, old = fleet.config, fleet.catalog
    changes = compare(old, message.catalog, shape)
    config.problems, config.needs_restart, config.read_at = (), message.needs_restart, now
    metrics.CONFIG_REFUSED.set(0)
    metrics.CONFIG_READ.labels("taken").inc()
    fleet.events.add(now, "config_reloaded", message=_told(changes, message.needs_restart))
    fleet.policy = message.policy
    if not changes:
        return
    fleet.renew_catalog(message.catalog)  # 1
    for instance in list(fleet.instances.values()):
        _judge(fleet, instance, now)  # 2, 3
    for name in (*changes.removed, *changes.reshaped):  # 4
        fleet.circuits.forget(name)
        fleet.unhealthy.pop(name, None)
    for name in changes.removed:
        fleet.pinned.discard(name)
        fleet.ordered.discard(name)
        fleet.unload.discard(name)
    _watch_new(fleet, now)  # 5


def _judge(fleet: Fleet, instance: Instance, now: float) -> None:
    model = fleet.catalog.models.get(instance.model)
    instance.replaced = _why(instance, model)
    if not instance.replaced:
        assert model is not None
        fleet.keepers[instance.id].model = model  # its health check and its times
        return
    demand = fleet.link.demand.get(instance.model)
    waited_for = demand is not None and demand.waiting > 0
    starting = instance.state is InstanceState.STARTING
    used = instance.leases or instance.running or waited_for or instance.model in fleet.pinned
    if model is not None and not model.external and (used or starting):
        fleet.ordered.add(instance.model)
    if starting:
        fleet.stop(instance, now, instance.replaced)


def _why(instance: Instance, model: Model | None) -> str:
    """Why it must go; empty = it may go on."""
    if model is None:
        return "its model was taken out of the configuration"
    if instance.shape != shape(model) or (model.external and instance.address not in addresses(model)):
        return "its model's configuration has changed"
    return ""


def addresses(model: Model) -> list[str]:
    """Where the servers of an external model are, as their instances have it."""
    return [url.rstrip("/") for url in model.urls]


def _watch_new(fleet: Fleet, now: float) -> None:
    for model in fleet.catalog.models.values():
        watched = {instance.address for instance in fleet.instances.values() if instance.model == model.name}
        for address in addresses(model):
            if address not in watched:
                fleet.watch_external(model, address, now)


def _told(changes: Changes, needs_restart: tuple[str, ...]) -> str:
    if not needs_restart:
        return str(changes)
    return f"{changes}; after a restart of the service: {', '.join(needs_restart)}"
