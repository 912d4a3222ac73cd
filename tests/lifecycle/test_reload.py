"""A changed configuration: what it means (pure), what the plan makes of it, and what admission is told."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.lifecycle.harness import SERVER, Admission, Service, model
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.budget import Card
from tidegate_lifecycle.catalog import Catalog, Model
from tidegate_lifecycle.docker_settings import DockerSettings
from tidegate_lifecycle.engines import shape
from tidegate_lifecycle.instance import Drain, DrainCause, Instance, InstanceState
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.reload import compare, needs_restart
from tidegate_lifecycle.settings import LifecycleSettings
from tidegate_lifecycle.world import Demand, Start, StartDrain, Stop, Undrain, WaitReason, World

Make = Callable[..., Service]

NAMES = st.sampled_from(["a", "b", "c", "d"])
FORMS = st.builds(Model, st.just(""), max_queue=st.sampled_from([1, 2]), source=st.sampled_from(["x", "y"]))
CATALOGS = st.dictionaries(NAMES, FORMS).map(
    lambda models: Catalog({name: replace(form, name=name) for name, form in models.items()})
)


@given(CATALOGS, CATALOGS)
def test_every_difference_is_told_once(old: Catalog, new: Catalog) -> None:
    """Each model that differs is in exactly one part, and the parts say truly how; equal ones are in none."""
    changes = compare(old, new, lambda form: form.source)
    parts = [changes.added, changes.removed, changes.reshaped, changes.adjusted]
    named = [name for part in parts for name in part]
    assert len(named) == len(set(named))
    assert set(named) == {
        name for name in old.models.keys() | new.models.keys() if old.models.get(name) != new.models.get(name)
    }
    assert set(changes.added) == new.models.keys() - old.models.keys()
    assert set(changes.removed) == old.models.keys() - new.models.keys()
    assert all(old.models[name].source != new.models[name].source for name in changes.reshaped)
    assert all(old.models[name].source == new.models[name].source for name in changes.adjusted)
    assert bool(changes) == (old != new)
    back = compare(new, old, lambda form: form.source)
    assert (back.added, back.removed) == (changes.removed, changes.added)
    assert (back.reshaped, back.adjusted) == (changes.reshaped, changes.adjusted)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"aliases": ("x",)}, True),
        ({"max_concurrent": 3, "max_queue": 4, "instances": 2}, True),
        ({"idle_timeout": 5.0, "start_timeout": 7.0, "health_path": "/live"}, True),
        ({"request_defaults": {"a": 1}, "always_on": True}, True),
        ({"vram_mib": 5}, False),
        ({"vram_share": 0.5}, False),
        ({"pool": "other"}, False),
        ({"tensor_parallel_size": 2}, False),
        ({"env": {"A": "1"}}, False),
        ({"extra_args": ("-x",)}, False),
        ({"engine": "external", "urls": ("http://h",)}, False),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "llamacpp", "command"])
def test_what_gives_a_server_another_shape(engine: str, change: dict[str, Any], same: bool) -> None:
    """What reaches the server, and where and how large it is; not what admission and edge make of it."""
    before = Model("m", engine=engine, source="org/m", command=("run",))
    assert (shape(before) == shape(replace(before, **change))) is same


def test_keys_that_need_a_restart_are_named() -> None:
    """Times are taken over, and the image that models leave out is theirs; the rest is named in full."""
    old = LifecycleSettings()
    times = {"idle_timeout": 1.0, "min_residency": 1.0, "max_swap_wait": 1.0, "drain_timeout": 1.0}
    assert needs_restart(old, old.model_copy(update=times), "lifecycle") == ()
    docker = DockerSettings().model_copy(update={"image": "x/y:1", "network": "n"})
    new = old.model_copy(update={"listen": "127.0.0.1:1", "docker": docker})
    assert needs_restart(old, new, "lifecycle") == ("lifecycle.listen", "lifecycle.docker.network")


# -- the plan ------------------------------------------------------------------------------------------

NOW = 1000.0


def server(name: str, **keys: Any) -> Instance:
    item = Instance(f"{name}-1", name, ("gpu0",), 10 << 10, 0.0, state=InstanceState.READY, ready_at=1.0)
    for key, value in {"generation": 1, **keys}.items():
        setattr(item, key, value)
    return item


def world(*items: Instance, models: str = "ab", card_gib: int = 24, **keys: Any) -> World:
    keys = {"settled": True, "seen": 9, **keys}
    catalog = {name: Model(name, vram_mib=10 << 10) for name in models}
    return World(catalog, (Card("gpu0", "default", card_gib << 10, card_gib << 10),), items, **keys)


def test_a_replaced_server_drains_and_stays_drained() -> None:
    """In use or not, of a model that exists or not; it isn't taken back, whoever waits for it."""
    for models in ("ab", "b"):
        item = server("a", replaced="changed", leases=3)
        (action,) = plan(world(item, models=models), NOW).actions
        assert action == StartDrain("a-1", DrainCause.RELOAD, "changed")
        item.start_drain(Drain(DrainCause.RELOAD, NOW, None), "changed")
        item.generation = 5
        waiting = {"a": Demand(1, NOW - 1)}
        small = world(item, models=models, card_gib=12, demand=waiting)
        assert not plan(small, NOW).actions
        item.leases = 0
        assert plan(small, NOW).actions == (Stop("a-1", cut=False),)


def test_nothing_drains_while_admission_is_unsettled() -> None:
    """Then only what adds is done, and the server goes on serving as it is."""
    item = server("a", replaced="changed")
    decided = plan(world(item, settled=False, demand={"a": Demand(1, NOW - 1)}), NOW)
    assert not decided.actions


def test_no_other_model_makes_room_for_a_new_server() -> None:
    """The former one does; where there is room beside it, the new one starts at once."""
    old = server("a", replaced="changed", leases=1)
    old.start_drain(Drain(DrainCause.RELOAD, NOW, None), "changed")
    waiting = {"a": Demand(1, NOW - 1)}
    decided = plan(world(old, server("b"), demand=waiting), NOW)
    assert not decided.actions
    assert decided.waits["a"].reason is WaitReason.ROOM
    decided = plan(world(old, server("b"), demand=waiting, card_gib=40), NOW)
    assert decided.actions == (Start("a", ("gpu0",), 10 << 10),)


def test_a_server_whose_configuration_is_back_serves_again() -> None:
    """The edit was taken back before it had ended."""
    item = server("a")
    item.start_drain(Drain(DrainCause.RELOAD, NOW, None), "changed")
    assert plan(world(item), NOW).actions == (Undrain("a-1"),)


# -- the service ---------------------------------------------------------------------------------------


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes a service in a folder; stopped at the end."""
    made: list[Service] = []

    def one(models: dict[str, Any], **lifecycle: Any) -> Service:
        made.append(Service(tmp_path, models, **lifecycle))
        return made[-1]

    yield one
    for service in made:
        assert await service.stop() == 0, service.log.read_text()
        assert "BlockingError" not in service.log.read_text()


def edit(service: Service, **models: dict[str, Any] | None) -> None:
    """Changes models of the file, or takes them out (None)."""
    config = yaml.safe_load(service.config.read_text())
    config["models"] |= models
    config["models"] = {name: entry for name, entry in config["models"].items() if entry is not None}
    service.config.write_text(yaml.safe_dump(config))


@contextlib.asynccontextmanager
async def elsewhere(port: int) -> AsyncIterator[str]:
    """A server that somebody else runs; its URL."""
    process = await asyncio.create_subprocess_exec(sys.executable, str(SERVER), "--port", str(port))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


async def test_a_removed_model_is_refused_and_then_forgotten(make: Make) -> None:
    """Its server drains under its lease while the model is refused; when it has gone, so is the model."""
    service = make({"a": model(), "b": model()})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        found = await admission.ready("a")
        admission.lease(found.instance_id, 1)
        edit(service, a=None)
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
        assert admission.models["a"].reason == pb.REASON_NOT_FOUND
        assert admission.reports[-1].catalog_generation.n == 2
        admission.lease(found.instance_id, 0)
        await admission.until(lambda: "a" in admission.reports[-1].removed_models)
        edit(service, a=model())
        await admission.until(lambda: admission.reports[-1].catalog_generation.n == 3)
        admission.say(a=1)
        assert (await admission.ready("a")).instance_id != found.instance_id
        assert "a" not in admission.reports[-1].removed_models


async def test_an_edit_that_is_taken_back_costs_nothing(make: Make) -> None:
    """The server that drained under a lease serves again; an admission that is unsettled sees no drain."""
    service = make({"a": model()})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        found = await admission.ready("a")
        admission.lease(found.instance_id, 1)
        edit(service, a=model("20GiB"))
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
        edit(service, a=model())
        back = await admission.until(lambda: admission.instance("a"))
        assert back.instance_id == found.instance_id
        admission.settled = False
        admission.say()
        edit(service, a=model("12GiB"))
        await admission.until(lambda: admission.reports[-1].catalog_generation.n == 4)
        await service.elapse(0.5)
        assert admission.instance("a")
        admission.settled = True
        admission.lease(found.instance_id, 0)
        again = await admission.until(
            lambda: (one := admission.instance("a")) and one.instance_id != found.instance_id and one
        )
        assert again.address != found.address


async def test_servers_elsewhere_come_and_go(make: Make, unused_tcp_port_factory: Callable[[], int]) -> None:
    """A URL that is taken out drains under its lease, a new one is watched; then the model runs here."""
    ports = unused_tcp_port_factory(), unused_tcp_port_factory()
    async with elsewhere(ports[0]) as old, elsewhere(ports[1]) as new:
        service = make({"x": {"engine": "external", "urls": [old]}, "here": model()})
        await service.start()
        async with Admission(service).connected() as admission:
            found = await admission.until(lambda: admission.instance("x"))
            admission.lease(found.instance_id, 1)
            edit(service, x={"engine": "external", "urls": [new]})
            assert (await admission.until(lambda: admission.instance("x"))).address in (old, new)
            draining = await admission.until(lambda: admission.instance("x", pb.INSTANCE_STATE_DRAINING))
            assert draining.address == old
            added = await admission.until(lambda: admission.instance("x"))
            assert added.address == new
            admission.lease(found.instance_id, 0)
            await admission.until(lambda: [one.address for one in admission.models["x"].instances] == [new])
            edit(service, x=model())
            await admission.gone("x")
            admission.say(x=1)
            assert (await admission.ready("x")).address not in (old, new)
