"""What goes wrong: each fault is done and, when its time is over, undone."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

from tests.simulation.world import World
from tidegate_admission import views
from tidegate_lifecycle.messages import Order

Fault = Callable[["Faults"], None]


class Faults:
    """Does something wrong every now and then, until it is told to stop."""

    def __init__(self, world: World, every: float, kinds: tuple[Fault, ...] = ()) -> None:
        """`every`: mean seconds between two faults."""
        self.world, self.every = world, every
        self.kinds = kinds or ALL
        self.on = True
        self.counts: dict[str, int] = {}

    def begin(self) -> None:
        """Begins."""
        self.world.after(self.world.random.expovariate(1 / self.every), self._next)

    def _next(self) -> None:
        if not self.on:
            return
        kind = self.world.random.choice(self.kinds)
        self.counts[kind.__name__] = self.counts.get(kind.__name__, 0) + 1
        kind(self)
        self.begin()

    def stop(self) -> None:
        """Nothing goes wrong any more, and what was wrong is undone."""
        self.on = False
        world = self.world
        world.note("faults", "end")
        for pair in [*world.network.down, *world.network.slow]:
            world.network.heal(*sorted(pair))
        for process in list(world.network.processes.values()):
            if process.frozen:
                process.thaw()
        world.start_all()
        world.machine.failing = world.machine.hanging = 0.0
        for server in world.servers():
            server.hung = False

    # --- what the faults are made of ---------------------------------------------------------------------

    def kill(self, name: str, longest: float) -> None:
        """kill -9, and a new one after a while."""
        process = self.world.network.processes.get(name)
        if process is None:
            return
        self.world.note("fault", f"kill {name}")
        process.kill()
        pause = self.world.random.choice([0.02, self.world.random.uniform(0.1, longest)])
        self.world.after(pause, functools.partial(self.world.start, name))

    def freeze(self, name: str, longest: float) -> None:
        """SIGSTOP, and SIGCONT after a while; peers may notice by their pings."""
        process, dice = self.world.network.processes.get(name), self.world.random
        if process is None or process.frozen:
            return
        seconds = dice.uniform(0.3, longest)
        self.world.note("fault", f"freeze {name} for {seconds:.1f} s")
        process.freeze()
        if seconds > 12.0 and dice.random() < 0.5:
            for peer in sorted(self.world.network.processes):
                self.world.network.cut(name, peer, (peer,))
        self.world.after(seconds, lambda: process.thaw() if process.frozen else None)

    def cut(self, one: str, other: str, longest: float) -> None:
        """The link breaks, and nothing gets through for a while; both ends see it, one does, or none."""
        dice, network = self.world.random, self.world.network
        told = dice.choice([(one, other), (one,), (other,), ()])
        seconds = dice.choice([0.0, dice.uniform(0.1, longest)])
        self.world.note("fault", f"cut {one}-{other} for {seconds:.1f} s, seen by {told}")
        if seconds:
            network.down.add(frozenset((one, other)))
        network.cut(one, other, told)
        self.world.after(seconds, functools.partial(network.heal, one, other))

    def an_edge(self) -> str:
        """Any of the edges."""
        return self.world.random.choice(sorted(self.world.edges))


# --- the faults --------------------------------------------------------------------------------------


def edge_killed(faults: Faults) -> None:
    faults.kill(faults.an_edge(), 15.0)


def edge_frozen(faults: Faults) -> None:
    faults.freeze(faults.an_edge(), 25.0)


def edge_leaves(faults: Faults) -> None:
    """A graceful end, and a new one."""
    edges, world = faults.world.living_edges(), faults.world
    if edges:
        edge = world.random.choice(edges)
        world.note("fault", f"{edge.name} leaves")
        edge.leaving = True
        edge.post(lambda: edge.spawn(edge.leave()))


def admission_killed(faults: Faults) -> None:
    faults.kill("admission", 20.0)


def admission_frozen(faults: Faults) -> None:
    faults.freeze("admission", 25.0)


def lifecycle_killed(faults: Faults) -> None:
    faults.kill("lifecycle", 20.0)


def lifecycle_frozen(faults: Faults) -> None:
    faults.freeze("lifecycle", 20.0)


def both_killed(faults: Faults) -> None:
    faults.kill("admission", 10.0)
    faults.kill("lifecycle", 10.0)


def session_cut(faults: Faults) -> None:
    faults.cut(faults.an_edge(), "admission", 40.0)


def long_cut(faults: Faults) -> None:
    """Longer than control_grace."""
    edge, world = faults.an_edge(), faults.world
    world.network.down.add(frozenset((edge, "admission")))
    world.note("fault", f"long cut {edge}-admission")
    world.network.cut(edge, "admission", (edge,))
    seconds = world.setting.control_grace + world.random.uniform(-5.0, 30.0)
    world.after(seconds, functools.partial(world.network.heal, edge, "admission"))


def coordinate_cut(faults: Faults) -> None:
    faults.cut("admission", "lifecycle", 30.0)


def slow_link(faults: Faults) -> None:
    world = faults.world
    pair = world.random.choice([(faults.an_edge(), "admission"), ("admission", "lifecycle")])
    world.note("fault", f"slow {pair}")
    world.network.slow.add(frozenset(pair))
    world.after(world.random.uniform(1.0, 30.0), lambda: world.network.slow.discard(frozenset(pair)))


def server_crashes(faults: Faults) -> None:
    servers = faults.world.servers()
    if servers:
        faults.world.machine.end(faults.world.random.choice(servers), "signal 9")


def server_hangs(faults: Faults) -> None:
    """It answers nothing any more: its health checks fail."""
    servers = faults.world.servers()
    if servers:
        server = faults.world.random.choice(servers)
        faults.world.note("fault", f"{server.id} hangs")
        server.hung = True


def loads_fail(faults: Faults) -> None:
    """For a while starts fail, never end, or are slow."""
    machine, dice = faults.world.machine, faults.world.random
    machine.failing, machine.hanging = dice.choice([(0.5, 0.0), (0.0, 0.3), (0.2, 0.2)])
    machine.load_time = dice.choice([(0.2, 2.0), (2.0, 8.0), (5.0, 18.0)])

    def better() -> None:
        machine.failing = machine.hanging = 0.0

    faults.world.after(dice.uniform(5.0, 40.0), better)


def limits_change(faults: Faults) -> None:
    dice, name = faults.world.random, faults.world.random.choice(sorted(faults.world.models))
    limits = {"max_concurrent": dice.randint(1, 6), "max_queue": dice.randint(2, 30)}
    faults.world.note("fault", f"{name} has {limits}")
    faults.world.set_limits(name, **limits)


def lease_revoked(faults: Faults) -> None:
    admission, world = faults.world.admission, faults.world
    if admission is None or admission.frozen:
        return
    leases = views.leases(admission.dispatcher)
    if leases:
        _, ticket = world.random.choice(leases)
        world.note("fault", f"revoke {ticket}")
        world.invariants.revoked.add(ticket.id)
        admission.post(lambda: admission.dispatcher.revoke(ticket.id, admission.loop.time()))


def operator_orders(faults: Faults) -> None:
    """Loads, unloads, pins or unpins a model."""
    lifecycle, dice = faults.world.lifecycle, faults.world.random
    if lifecycle is None or lifecycle.reconciler is None:
        return
    verb, name = (
        dice.choice(["load", "unload", "pin", "unpin", "unpin"]),
        dice.choice(sorted(faults.world.models)),
    )
    faults.world.note("fault", f"operator: {verb} {name}")
    post = lifecycle.reconciler.post

    def order() -> None:
        done: asyncio.Future[None] = lifecycle.loop.create_future()
        done.add_done_callback(lambda future: future.exception())
        post(Order(verb, name, done))

    lifecycle.post(order)


ALL: tuple[Fault, ...] = (
    edge_killed, edge_frozen, edge_leaves, admission_killed, admission_frozen, lifecycle_killed,
    lifecycle_frozen, both_killed, session_cut, session_cut, long_cut, coordinate_cut, slow_link,
    server_crashes, server_hangs, loads_fail, limits_change, lease_revoked, operator_orders,
)  # fmt: skip
