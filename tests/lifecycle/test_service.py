"""The service over real gRPC, with real model servers."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc import aio

from tests.lifecycle.harness import Admission, Service, alive, end, model
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis.rpc import reason_of

Make = Callable[..., Service]


async def test_cold_start(make: Make) -> None:
    """A waiting ticket starts the model's server, and supply tells its address once it is ready."""
    service = make({"a": model(max_concurrent=3, max_queue=9, aliases=["aa"])})
    await service.start()
    async with Admission(service).connected() as admission:
        await admission.until(lambda: "a" in admission.models)
        first = admission.reports[0]
        assert first.whole
        assert first.settled
        assert (first.roster_known, list(first.roster)) == (True, []), "a first boot waits for nobody"
        assert admission.models["a"].state == pb.MODEL_STATE_STOPPED
        admission.say(a=1)
        await admission.until(lambda: admission.models["a"].start_deadline_ms > 0)
        instance = await admission.ready("a")
        assert instance.slots == admission.models["a"].max_concurrent == 3
        assert admission.models["a"].max_queue == 9
        assert instance.address.startswith("http://127.0.0.1:")
    status = await service.status()
    assert [item.loads for item in status.models] == [1]
    assert status.instances[0].pid
    assert await service.stop() == 0
    assert not alive(status.instances[0].pid)


async def test_one_start_for_many(make: Make, tmp_path: Path) -> None:
    """However many tickets wait and reports come, the model is started once."""
    starts = tmp_path / "starts"
    service = make({"a": model("1GiB", "--load", "0.5", "--starts", str(starts), instances=1)})
    await service.start()
    async with Admission(service).connected() as admission:
        for waiting in range(1, 60):
            admission.say(a=waiting)
        await admission.ready("a")
    assert starts.read_text() == "start\n"


async def test_early_failure(make: Make, tmp_path: Path) -> None:
    """A server that ends at its start is told at once with its last words, without paths; and is tried again
    for the next ticket after the back-off."""
    flag = tmp_path / "repaired"
    service = make({"a": model("1GiB", "--exit-until", str(flag))})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        failed = await admission.until(lambda: (m := admission.models.get("a")) and m.reason and m)
        assert failed.reason == pb.REASON_START_FAILED
        assert "exit status 3" in failed.message
        assert "damaged" in failed.message
        assert "/secret" not in failed.message
        assert 0 < failed.retry_after_ms <= 1000
        admission.say(a=0)
        await admission.until(lambda: not admission.models["a"].reason)
        assert admission.models["a"].state == pb.MODEL_STATE_FAILED
        flag.touch()
        admission.say(a=1)
        await admission.ready("a")


async def test_missing_program(make: Make) -> None:
    """A program that isn't there is a failed start with a reason, not a dead service."""
    service = make({"a": {"command": ["/nowhere/to/be/found", "{port}"], "vram": "1GiB"}})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        failed = await admission.until(lambda: (m := admission.models.get("a")) and m.reason and m)
        assert failed.reason == pb.REASON_START_FAILED
        assert "/nowhere" not in failed.message


async def test_eviction_of_an_idle_model(make: Make) -> None:
    """Of two that were used a moment ago the one that is asked for less makes room, through DRAINING, and
    only when admission has seen that."""
    service = make({"a": model("12GiB"), "b": model("12GiB"), "c": model("12GiB")})
    await service.start()
    async with Admission(service).connected() as admission:
        for name in ("a", "b"):
            admission.say(**{name: 1})
            await admission.ready(name)
        admission.rates["a"] = 1.0
        admission.acknowledge = False
        admission.say(c=1)
        await admission.until(lambda: admission.instance("b", pb.INSTANCE_STATE_DRAINING))
        admission.acknowledge = True
        admission.say()
        b = (await service.status()).instances
        assert {item.model for item in b} == {"a", "b"}
        admission._seen = admission.reports[-1].generation
        admission.say()
        await admission.ready("c")
        assert admission.instance("a")
        await admission.gone("b")


async def test_interest_evicts_idle_models_only_and_ends_with_its_admission(make: Make) -> None:
    """Somebody who was refused starts the model beside a busy one, pushes only an idle one out, and is
    forgotten with the admission that refused him."""
    service = make({"a": model("20GiB"), "b": model("20GiB", idle_timeout="100ms")})
    await service.start()
    async with Admission(service, incarnation=1).connected() as admission:
        admission.say(a=1)
        a = await admission.ready("a")
        admission.lease(a.instance_id, 1)
        admission.interest["b"] = 300.0
        admission.say()
        await service.elapse(1.0)  # ten times max_swap_wait: a ticket would have made it drain
        assert admission.instance("a")
        admission.lease(a.instance_id, 0)
        await admission.until(lambda: admission.instance("b"))
        await service.elapse(0.5)
        assert admission.instance("b"), "an interest is no idleness"
    async with Admission(service, incarnation=2).connected() as admission:
        await admission.gone("b")


async def test_an_interest_ends_when_its_time_is_over(make: Make) -> None:
    """After `interest_ms` the model is idle like any other."""
    service = make({"a": model("20GiB", idle_timeout="100ms")})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.acknowledge = False  # each report would begin the interest anew
        admission.interest["a"] = 1.5
        admission.say()
        await admission.until(lambda: admission.instance("a"))
        admission.interest.clear()
        admission.acknowledge = True
        began = admission.reports[-1].generation.n
        admission._seen = admission.reports[-1].generation
        admission.say()
        await admission.gone("a")
        assert admission.reports[-1].generation.n > began


async def test_load_times_are_learned_and_told_after_a_restart(make: Make) -> None:
    """A stopped model is told with what its loads took, from whenever it is asked for; a starting one with
    what remains of that; also by a lifecycle that was killed in between."""
    service = make({"a": model("1GiB", "--load", "0.6", idle_timeout="100ms"), "b": model("1GiB")})
    await service.start()
    async with Admission(service).connected() as admission:
        await admission.until(lambda: "a" in admission.models)
        assert not admission.models["a"].HasField("ready_in_ms"), "nobody knows before the first load"
        admission.say(a=1)
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_STARTING))
        assert not admission.models["a"].HasField("ready_in_ms")
        await admission.ready("a")
        await admission.gone("a")
        learned = await admission.until(lambda: admission.models["a"].ready_in_ms)
        assert 600 <= learned < 5000
    await service.kill()
    await service.start()
    async with Admission(service).connected() as admission:
        await admission.until(lambda: "a" in admission.models)
        assert admission.models["a"].ready_in_ms == learned
        assert not admission.models["a"].under_way
        assert not admission.models["b"].HasField("ready_in_ms")
        admission.say(a=1)
        await admission.until(lambda: admission.models["a"].start_deadline_ms)
        assert 0 < admission.models["a"].ready_in_ms <= learned
        assert admission.models["a"].under_way
        await admission.ready("a")


async def test_busy_model_gives_way(make: Make) -> None:
    """A model with leases drains for another's tickets after max_swap_wait, and stops when its leases end."""
    service = make({"a": model("20GiB"), "b": model("20GiB")})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        a = await admission.ready("a")
        admission.lease(a.instance_id, 2)
        admission.say(b=1)
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
        admission.lease(a.instance_id, 1)
        assert admission.instance("b") is None
        admission.lease(a.instance_id, 0)
        await admission.ready("b")


async def test_never_fits(make: Make) -> None:
    """A model larger than any card is refused at once, in numbers, and evicts nothing."""
    service = make({"a": model("20GiB"), "huge": model("30GiB")})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        await admission.ready("a")
        huge = admission.models["huge"]
        assert huge.reason == pb.REASON_NEVER_FITS
        assert "30 GiB" in huge.message
        assert "24" in huge.message
        admission.say(huge=1)
        async with service.stub() as stub:
            plan = await stub.PlanPlacement(pb.PlanPlacementRequest(model="huge"), timeout=5)
            with pytest.raises(aio.AioRpcError) as refused:
                await stub.LoadModel(pb.LoadModelRequest(model="huge"), timeout=5)
        assert reason_of(refused.value) == "REASON_NEVER_FITS"
        assert not plan.actions
        assert "a 20 GiB" in plan.devices[0]
        assert admission.instance("a")


async def test_idle_stop(make: Make) -> None:
    """A model without use is stopped idle_timeout after its last release, not before."""
    service = make({"a": model(idle_timeout="600ms")})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        a = await admission.ready("a")
        admission.lease(a.instance_id, 1)
        await service.elapse(1.0)
        assert admission.instance("a")
        admission.lease(a.instance_id, 0)
        await admission.gone("a")
        reasons = [m.instances[0].state for r in admission.reports for m in r.models if m.instances]
        assert pb.INSTANCE_STATE_DRAINING in reasons


async def test_no_stop_without_admission(make: Make) -> None:
    """While admission is away nothing is stopped; an unsettled one changes nothing about that."""
    service = make({"a": model(idle_timeout="100ms")})
    await service.start()
    async with Admission(service, settled=False).connected() as admission:
        admission.say(a=1)
        await admission.ready("a")
        await service.elapse(0.5)
        assert admission.instance("a")
    await service.elapse(0.5)
    assert [item.state for item in (await service.status()).instances] == [pb.INSTANCE_STATE_READY]
    async with Admission(service, incarnation=8).connected() as admission:
        await admission.gone("a")


async def test_roster(make: Make) -> None:
    """The roster of the previous admission is told to the next one, after a kill -9 of lifecycle too."""
    service = make({"a": model()})
    await service.start()
    async with Admission(service, incarnation=1).connected() as admission:
        admission.roster = ["edge-1", "edge-2"]
        admission.say()
        await admission.until(lambda: admission.reports)
        assert admission.reports[0].first_admission
        async with Admission(service, incarnation=2).connected() as newer:
            first: pb.SupplyReport = await newer.until(lambda: newer.reports and newer.reports[0])
            assert first.roster_known
            assert not first.first_admission
            assert list(first.roster) == ["edge-1", "edge-2"]
            await admission.until(lambda: admission.error)
            assert admission.error is not None
            assert admission.error.code() == grpc.StatusCode.ABORTED
            assert reason_of(admission.error) == "REASON_SUPERSEDED"
            newer.roster = ["edge-3"]
            newer.say(a=1)
            await newer.ready("a")
    await service.kill()
    await service.start()
    async with Admission(service, incarnation=3).connected() as admission:
        first = await admission.until(lambda: admission.reports and admission.reports[0])
        assert list(first.roster) == ["edge-3"]
        assert not first.first_admission


async def test_adoption_after_kill(make: Make) -> None:
    """kill -9 of lifecycle leaves model servers running; the next one adopts them, under a higher boot."""
    service = make({"a": model("1GiB"), "b": model("1GiB", "--load", "2")})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        a = await admission.ready("a")
        admission.say(b=1)
        await admission.until(
            lambda: (i := admission.instance("b", pb.INSTANCE_STATE_STARTING)) and i.address
        )
        boot = admission.reports[0].generation.incarnation
        pids = {item.model: item.pid for item in (await service.status()).instances}
        await service.kill()
    assert alive(pids["a"])
    await service.start()
    async with Admission(service).connected() as admission:
        again = await admission.until(lambda: admission.instance("a"))
        assert (again.instance_id, again.address) == (a.instance_id, a.address)
        assert admission.reports[0].generation.incarnation > boot
        await admission.ready("b")
    status = await service.status()
    assert {item.model: item.pid for item in status.instances} == pids
    assert all(item.adopted for item in status.instances)
    # The adopted one isn't a child: its end is seen all the same, and it is started again.
    end(pids["a"])
    async with Admission(service).connected() as admission:
        await admission.until(lambda: (i := admission.instance("a")) and i.instance_id != a.instance_id)
    assert next(item.restarts for item in (await service.status()).models if item.model == "a") == 1


async def test_changed_configuration_is_not_adopted(make: Make) -> None:
    """A running server whose model was changed, or removed, is stopped at the next start."""
    service = make({"a": model("1GiB"), "b": model("1GiB", always_on=True)}, on_stop="leave")
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        await admission.ready("a")
        await admission.ready("b")
    pids = {item.model: item.pid for item in (await service.status()).instances}
    assert await service.stop() == 0
    assert all(alive(pid) for pid in pids.values())
    service = make({"b": model("2GiB", always_on=True)})
    await service.start()
    async with Admission(service).connected() as admission:
        await admission.until(lambda: (i := admission.instance("b")) and i)
    assert not any(alive(pid) for pid in pids.values())


async def test_sweep(make: Make) -> None:
    """`--sweep` stops what a dead lifecycle has left, and refuses while one lives."""
    service = make({"a": model("1GiB")})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        await admission.ready("a")
    pid = (await service.status()).instances[0].pid
    status, said = await service.run("--sweep")
    assert status == 78, said
    assert alive(pid)
    await service.kill()
    status, said = await service.run("--sweep")
    assert status == 0, said
    assert not alive(pid)


async def test_data_dir_in_use(make: Make) -> None:
    """A second service on the same data directory ends with 78 and says why."""
    service = make({"a": model()})
    await service.start()
    status, said = await service.run()
    assert status == 78
    assert "lifecycle.data_dir" in said


async def test_unwritable_data_dir(make: Make, tmp_path: Path) -> None:
    """A data directory that can't be written ends with 78 and names the key."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    service = make({"a": model()}, data_dir=str(blocker / "data"))
    status, said = await service.run()
    assert status == 78
    assert "lifecycle.data_dir" in said


async def test_shutdown_waits_for_leases(make: Make) -> None:
    """On SIGTERM servers with leases drain, for at most five seconds, and nothing is left after ten."""
    service = make({"a": model()})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        a = await admission.ready("a")
        admission.lease(a.instance_id, 1)
        pid = (await service.status()).instances[0].pid
        assert service.process is not None
        service.process.terminate()
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
        assert alive(pid)
        admission.lease(a.instance_id, 0)
        async with asyncio.timeout(10):
            assert await service.process.wait() == 0
    assert not alive(pid)


async def test_orders(make: Make) -> None:
    """Load starts a model without a ticket, pin keeps it, unload drains and stops it; events tell."""
    service = make({"a": model(aliases=["alias"], idle_timeout="300ms")})
    await service.start()
    async with service.stub() as stub, Admission(service).connected() as admission:
        await stub.PinModel(pb.PinModelRequest(model="alias", pinned=True), timeout=5)
        await stub.LoadModel(pb.LoadModelRequest(model="alias"), timeout=5)
        await admission.until(lambda: admission.instance("a"))
        await service.elapse(0.6)
        assert admission.instance("a")
        with pytest.raises(aio.AioRpcError) as unknown:
            await stub.LoadModel(pb.LoadModelRequest(model="x"), timeout=5)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        await stub.UnloadModel(pb.UnloadModelRequest(model="a"), timeout=5)
        await admission.gone("a")
        call = stub.WatchEvents(pb.WatchEventsRequest(last=100), timeout=5)
        try:
            kinds = []
            async for response in call:
                kinds.append(response.event.kind)
                if response.event.kind == "gone":
                    break
        finally:
            call.cancel()
        wanted = ["starting", "ready", "draining", "stopping", "gone"]
        assert [kind for kind in kinds if kind in wanted] == wanted
        tail = stub.TailLog(pb.TailLogRequest(model="a"), timeout=5)
        try:
            assert [list(part.lines) async for part in tail] == [[]]
        finally:
            tail.cancel()


async def test_placements_and_refusals_are_explained_in_numbers_before_and_after(make: Make) -> None:
    """The dry run says what would be done and who could go; the events say the same of what was done."""
    service = make({"a": model("20GiB"), "b": model("16GiB"), "kept": model("14GiB"), "huge": model("30GiB")})
    await service.start()
    async with Admission(service).connected() as admission, service.stub() as stub:
        admission.say(a=1)
        a = await admission.ready("a")

        async def asked(name: str) -> pb.PlanPlacementResponse:
            return await stub.PlanPlacement(pb.PlanPlacementRequest(model=name), timeout=5)

        def plain(text: str) -> str:
            return re.sub(r"idle \d+ \w+", "idle", text)

        told = await asked("b")
        holder = "evictable: a 20 GiB, idle"
        assert list(map(plain, told.devices)) == [f"gpu0 has 4 free of 24 GiB; {holder}"]
        assert list(map(plain, told.actions)) == [f"drain and stop {a.instance_id} on gpu0 ({holder})"]
        assert told.problem == "needs 16 GiB (declared); others must go first"
        assert (await asked("huge")).problem == (
            "it can never fit: needs 30 GiB (declared); of the devices may be used: gpu0 24"
        )
        await stub.PinModel(pb.PinModelRequest(model="a", pinned=True), timeout=5)
        told = await asked("b")
        assert not told.actions
        assert "no room, and what holds it can't be made to go" in told.problem
        assert "pinned: a 20 GiB" in told.devices[0]
        admission.say(b=1)
        refused = await admission.until(lambda: (m := admission.models["b"]).reason and m)
        said = plain(f"needs 16 GiB (declared); {told.devices[0]}")
        assert plain(refused.message) == f"there is no room: {said}"
        await stub.PinModel(pb.PinModelRequest(model="a", pinned=False), timeout=5)
        await admission.ready("b")
        call = stub.WatchEvents(pb.WatchEventsRequest(last=100, until_now=True), timeout=5)
        events = [(one.event.kind, one.event.model, plain(one.event.message)) async for one in call]
    assert ("starting", "a", "on gpu0 (4 GiB stay free); needs 20 GiB (declared)") in events
    assert ("no_capacity", "b", said) in events
    assert ("draining", "a", "makes room for b, which needs 16 GiB (declared)") in events
    assert ("starting", "b", "on gpu0 (8 GiB stay free); needs 16 GiB (declared)") in events


async def test_always_on(make: Make) -> None:
    """An `always_on` model is started with the service, never idle-stopped, and makes no room for others."""
    service = make({"a": model("20GiB", always_on=True, idle_timeout="100ms"), "b": model("20GiB")})
    await service.start()
    async with Admission(service).connected() as admission:
        await admission.until(lambda: admission.instance("a"))
        admission.say(b=1)
        refused = await admission.until(lambda: (m := admission.models["b"]).reason and m)
        assert refused.reason == pb.REASON_NO_CAPACITY
        assert "a 20 GiB" in refused.message
        assert admission.instance("a")


async def test_external(make: Make, unused_tcp_port: int) -> None:
    """An external model is watched: unhealthy with a reason, ready when it answers, never started."""
    url = f"http://127.0.0.1:{unused_tcp_port}"
    service = make({"x": {"engine": "external", "urls": [url]}})
    await service.start()
    async with Admission(service).connected() as admission:
        await admission.until(lambda: (m := admission.models.get("x")) and m.reason == pb.REASON_UNHEALTHY)
        command = [sys.executable, str(Path(__file__).with_name("model_server.py")), "--port"]
        process = await asyncio.create_subprocess_exec(*command, str(unused_tcp_port))
        try:
            found = await admission.until(lambda: admission.instance("x"))
            assert found.address == url
            assert not admission.models["x"].reason
        finally:
            process.kill()
            await process.wait()


async def test_catalog(make: Make) -> None:
    """The catalogue is told whole at once, and again when a model's state has changed."""
    service = make({"a": model(aliases=["aa"], upstream_model="up", request_defaults={"temperature": 0})})
    await service.start()
    async with service.stub() as stub, Admission(service).connected() as admission:
        call = stub.WatchCatalog(pb.WatchCatalogRequest(), timeout=20)
        try:
            states = []
            async for response in call:
                entry = response.models[0]
                states.append(entry.state)
                if len(states) == 1:
                    assert (entry.name, list(entry.aliases), entry.upstream_model) == ("a", ["aa"], "up")
                    assert entry.request_defaults_json == '{"temperature": 0}'
                    admission.say(a=1)
                if entry.state == pb.MODEL_STATE_READY:
                    break
        finally:
            call.cancel()
        assert states[0] == pb.MODEL_STATE_STOPPED


async def test_a_broken_order_of_messages_is_refused(make: Make) -> None:
    """A first demand that isn't whole is INVALID."""
    service = make({"a": model()})
    await service.start()
    async with service.stub() as stub:
        call = stub.Coordinate(timeout=5)
        try:
            await call.write(pb.CoordinateRequest(demand=pb.DemandReport(whole=False)))
            with pytest.raises(aio.AioRpcError) as invalid:
                await call.read()
            assert reason_of(invalid.value) == "REASON_INVALID"
        finally:
            call.cancel()


async def test_events_before_anything_has_happened(make: Make) -> None:
    """None is an answer too, for all models; a model that there never was is an error."""
    service = make({"a": model()})
    await service.start()
    async with service.stub() as stub:
        request = pb.WatchEventsRequest(last=10, until_now=True)
        assert [event async for event in stub.WatchEvents(request, timeout=10)] == []
        request.model = "nobody"
        with pytest.raises(aio.AioRpcError, match="there is no model 'nobody'"):
            [event async for event in stub.WatchEvents(request, timeout=10)]
