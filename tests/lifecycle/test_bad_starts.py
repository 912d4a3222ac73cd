"""Model servers that don't become ready, or don't stay so: through the real service, with real processes."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.lifecycle.harness import Admission, Service, alive, end, model
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.circuits import DISTURBANCES
from tidegate_lifecycle.start_deadline import FLOOR

Make = Callable[..., Service]
PROFILING = "AssertionError: Error in memory profiling. Initial free memory 21.4 GiB, current 22.9 GiB."


def failed(admission: Admission, name: str) -> Callable[[], pb.ModelSupply | None]:
    """The model, when it is refused because of its start."""

    def look() -> pb.ModelSupply | None:
        item = admission.models.get(name)
        return item if item is not None and item.reason == pb.REASON_START_FAILED else None

    return look


def loading(admission: Admission, name: str) -> Callable[[], pb.ModelSupply | None]:
    """The model, while a server of it was launched and loads."""

    def look() -> pb.ModelSupply | None:
        item = admission.models.get(name)
        instance = admission.instance(name, pb.INSTANCE_STATE_STARTING)
        return item if item is not None and instance is not None and instance.address else None

    return look


async def pid_of(service: Service, name: str) -> int:
    """The process of a model's only server."""
    (found,) = (item.pid for item in (await service.status()).instances if item.model == name)
    return found


async def test_never_healthy(make: Make) -> None:
    """A server that never answers is ended at its start deadline, which admission was told; the next try is
    shown as one, and each failure doubles the back-off. A miss lengthens the next deadline but one."""
    service = make({"a": model("16MiB", "--load", "3600", start_timeout="1s")})
    await service.start()
    clock = asyncio.get_running_loop().time
    said = []
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        for tries, deadline in ((1, 1000), (2, 1000), (3, 2000)):
            trying = await admission.until(loading(admission, "a"))
            began = clock()
            pid = await pid_of(service, "a")
            assert trying.state == pb.MODEL_STATE_LOADING
            assert deadline - 1000 < trying.start_deadline_ms <= deadline
            assert trying.message.startswith("its last start failed, one try is under way") == (tries > 1)
            why = await admission.until(failed(admission, "a"))
            assert abs(clock() - began - trying.start_deadline_ms / 1000) < 1.0, "the grace of admission"
            assert why.state == pb.MODEL_STATE_FAILED
            assert "start deadline" in why.message
            said.append(why.retry_after_ms)
            await admission.gone("a")
            assert not alive(pid)
    assert [round(one / 1000) for one in said] == [1, 2, 4]


async def test_killed_while_it_loads(make: Make) -> None:
    """A server that the kernel kills for want of memory is told so at once, and its room is free again."""
    service = make({"a": model("20GiB", "--load", "3600", "--killed-after", "0.2"), "b": model("20GiB")})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        why = await admission.until(failed(admission, "a"), 5)
        assert "signal 9" in why.message
        admission.say(a=0, b=1)
        await admission.ready("b")


async def test_killed_by_hand(make: Make) -> None:
    """The end of a server that serves is seen within two seconds, and it is started again for nobody."""
    service = make({"a": model()})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        first = await admission.ready("a")
        end(await pid_of(service, "a"))
        await admission.until(
            lambda: all(i.instance_id != first.instance_id for i in admission.models["a"].instances), 2
        )
        await admission.until(lambda: admission.instance("a"))
    (status,) = (await service.status()).models
    assert (status.restarts, status.loads, status.failed_loads) == (1, 2, 0)


async def test_healthy_then_hung(make: Make) -> None:
    """A server that stops to answer is ended after three failed checks, though it doesn't react to being told
    to, and is started again."""
    service = make({"a": model()})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        first = await admission.ready("a")
        pid = await pid_of(service, "a")
        os.kill(pid, signal.SIGSTOP)
        second = await admission.until(
            lambda: (i := admission.instance("a")) and i.instance_id != first.instance_id and i, 40
        )
        assert second.address
        assert not alive(pid)
    (status,) = (await service.status()).models
    assert status.restarts == 1
    await service.said("3 health checks failed")


async def test_a_neighbours_fault_costs_no_back_off(make: Make, tmp_path: Path) -> None:
    """A start that dies for a neighbour's changed memory is tried again at once, and nobody is refused."""
    starts = tmp_path / "starts"
    flags = ("--starts", str(starts), "--last-words", PROFILING, "--failures", str(DISTURBANCES))
    service = make({"a": model("1GiB", *flags)})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        await admission.ready("a")
        assert not any(item.reason for report in admission.reports for item in report.models)
    assert len(starts.read_text().splitlines()) == DISTURBANCES + 1
    (status,) = (await service.status()).models
    assert (status.loads, status.failed_loads) == (1, 0)


async def test_a_neighbours_fault_counts_when_it_does_not_end(make: Make, tmp_path: Path) -> None:
    """After so many tries it is the model's own failure, with the reason; and one that nobody waits for any
    more is tried again as well."""
    starts = tmp_path / "starts"
    service = make({"a": model("1GiB", "--starts", str(starts), "--last-words", PROFILING)})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        await admission.until(starts.exists)
        admission.say(a=0)
        why = await admission.until(failed(admission, "a"))
        assert "another program's memory use changed" in why.message
        assert len(starts.read_text().splitlines()) == DISTURBANCES + 1
        assert 0 < why.retry_after_ms <= 1000


async def test_an_operators_load_does_not_wait_for_the_back_off(make: Make, tmp_path: Path) -> None:
    """Each order makes one try at once; what has failed counts on, and a success closes the circuit."""
    flag = tmp_path / "repaired"
    service = make({"a": model("1GiB", "--exit-until", str(flag))})
    await service.start()
    async with service.stub() as stub, Admission(service).connected() as admission:

        async def ended(tries: int) -> pb.ModelStatus:
            async with asyncio.timeout(15):
                while True:
                    status = await service.status()
                    (item,) = status.models
                    if item.failed_loads + item.loads == tries and (item.loads or not status.instances):
                        return item

        for tries in range(1, 6):
            if tries == 5:
                flag.touch()
            begun = await stub.LoadModel(pb.LoadModelRequest(model="a"), timeout=5)
            assert begun.state == pb.MODEL_STATE_LOADING, "at once"
            await ended(tries)
        assert (await ended(5)).loads == 1
        await admission.until(lambda: admission.instance("a"))
        seen = [m.retry_after_ms for r in admission.reports for m in r.models if m.reason]
        assert max(seen) > 7000, "the fourth failure backs off for eight seconds"
        assert not admission.models["a"].message


async def test_the_start_deadline_adapts_to_history(make: Make) -> None:
    """Once its load time is known the deadline follows it, over a restart too, whatever the setting says."""
    service = make({"a": model("16MiB", "--load", "0.3", start_timeout="20s", idle_timeout="100ms")})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        first = await admission.until(loading(admission, "a"))
        assert 19_000 < first.start_deadline_ms <= 20_000
        await admission.ready("a")
        await admission.gone("a")
        learned = await admission.until(lambda: admission.models["a"].ready_in_ms)
    await service.kill()
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        again = await admission.until(loading(admission, "a"))
        wanted = FLOOR * 1000 + 3 * learned
        assert wanted - 1000 < again.start_deadline_ms <= wanted + 10
        await admission.ready("a")


async def test_a_victim_returns_at_once_when_its_beneficiary_fails(make: Make, tmp_path: Path) -> None:
    """The model that was drained for another one is started again in the moment in which that one has failed:
    it waits neither for the other's back-off nor behind it, though the other's tickets wait as well."""
    starts = tmp_path / "starts"
    service = make(
        {"a": model("20GiB", "--starts", str(starts)), "b": model("20GiB", "--load", "0.5", "--exit", "3")}
    )
    await service.start()
    clock = asyncio.get_running_loop().time
    async with Admission(service).connected() as admission, service.stub() as stub:
        admission.say(a=1)
        a = await admission.ready("a")
        admission.lease(a.instance_id, 1)
        admission.say(b=1)
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
        admission.say(a=1)
        admission.lease(a.instance_id, 0)
        await admission.until(failed(admission, "b"))
        call = stub.WatchEvents(pb.WatchEventsRequest(last=100), timeout=10)
        try:
            failed_at, seen = math.inf, []
            async for response in call:
                event = response.event
                at = clock() - event.age_ms / 1000
                seen.append((event.kind, event.model))
                if seen[-1] == ("start_failed", "b"):
                    failed_at = at
                elif seen[-1] == ("starting", "a") and at >= failed_at:
                    assert at - failed_at < 0.8, "less than b's back-off"
                    break
        finally:
            call.cancel()
        assert seen.count(("starting", "b")) == 1
        await admission.ready("a")
    assert len(starts.read_text().splitlines()) == 2
