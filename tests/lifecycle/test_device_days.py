"""Bad days of the cards, through the real service: a program called nvidia-smi does what it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode, aio

from tests.lifecycle.harness import Admission, Service, model
from tests.support.nvidia_smi import GIB, NvidiaSmi, card, nvidia_smi
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis.rpc import reason_of

__all__ = ["nvidia_smi"]


def service(tmp_path: Path, models: dict[str, Any], **lifecycle: Any) -> Service:
    """One whose cards are those that nvidia-smi shows."""
    return Service(tmp_path, models, **{"devices": None, "drain_timeout": "3s", **lifecycle})


async def until(one: Service, what: Callable[[pb.GetStatusResponse], Any], within: float = 20.0) -> Any:
    """Waits until the status makes it true."""
    async with one.stub() as stub:
        for _ in range(int(within / 0.1)):
            status = await stub.GetStatus(pb.GetStatusRequest(), timeout=5)
            if found := what(status):
                return found
            await one.elapse(0.1)
    raise AssertionError(f"{status}\n{one.log.read_text()[-4000:]}")


async def test_freed_memory_waits_for_the_driver(tmp_path: Path, nvidia_smi: NvidiaSmi) -> None:
    """The victim has gone, its memory is still shown: the next one starts when it is shown free, and soon."""
    nvidia_smi.shows(card("GPU-a"))
    one = service(tmp_path, {"a": model("15GiB"), "b": model("15GiB"), "c": model("5GiB")})
    await one.start()
    try:
        admission = Admission(one)
        async with admission.connected():
            admission.say(a=1)
            await admission.ready("a")
            admission.say(c=1)
            await admission.ready("c")
            nvidia_smi.shows(card("GPU-a", used=20 * GIB))
            admission.say(b=1)
            await admission.gone("a")
            settling = await until(one, lambda status: status.devices[0].settling_mib)
            assert settling == 15 * GIB
            before = nvidia_smi.calls
            await one.elapse(1.5)
            status = await one.status()
            assert {item.model for item in status.instances} == {"c"}, "nobody else was evicted for it"
            assert status.devices[0].settling_mib == 15 * GIB
            assert status.devices[0].foreign_mib == 0
            assert nvidia_smi.calls - before >= 3, "the driver is asked again and again"
            nvidia_smi.shows(card("GPU-a", used=5 * GIB))
            await admission.ready("b")
            assert (await one.status()).devices[0].settling_mib == 0
    finally:
        await one.stop()


async def test_memory_that_never_comes_back_counts_as_others(tmp_path: Path, nvidia_smi: NvidiaSmi) -> None:
    """After the bound; an event says so, and the next model is refused in numbers."""
    nvidia_smi.shows(card("GPU-a"))
    one = service(tmp_path, {"a": model("15GiB"), "b": model("15GiB")})
    await one.start()
    try:
        admission = Admission(one)
        async with admission.connected():
            admission.say(a=1)
            await admission.ready("a")
            nvidia_smi.shows(card("GPU-a", used=14 * GIB))
            admission.say(b=1)
            await admission.gone("a")
            await until(one, lambda status: status.devices[0].foreign_mib == 14 * GIB, 25)
            refused = await admission.until(
                lambda: admission.models["b"] if admission.models["b"].reason else None
            )
            assert refused.reason == pb.REASON_NO_CAPACITY
            assert "14 GiB used by others" in refused.message
            await one.said("still in use after 15 s: they count as others'")
    finally:
        await one.stop()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 9", "nvidia-smi failed with status 9"),
        ("exec sleep 600", "nvidia-smi gave no answer within 10 s"),
        ("echo nonsense", "nvidia-smi shows no card, but 'nonsense'"),
    ],
)
async def test_a_driver_that_fails_stops_nothing(
    tmp_path: Path, nvidia_smi: NvidiaSmi, script: str, words: str
) -> None:
    """What runs goes on, another model is started, and status says what is wrong and since when."""
    nvidia_smi.shows(card("GPU-a"))
    one = service(tmp_path, {"a": model("5GiB"), "b": model("5GiB")})
    await one.start()
    try:
        admission = Admission(one)
        async with admission.connected():
            admission.say(a=1)
            server = await admission.ready("a")
            nvidia_smi.does(script)
            (device,) = await until(one, lambda status: status.devices[0].problem and status.devices)
            assert device.problem == words
            assert device.HasField("problem_ms")
            assert not device.missing
            admission.say(b=1)
            await admission.ready("b")
            assert admission.instance("a") == server
            nvidia_smi.shows(card("GPU-a"))
            await until(one, lambda status: not status.devices[0].problem)
            assert not (await one.status()).devices[0].HasField("problem_ms")
    finally:
        await one.stop()


async def test_a_card_that_vanishes_keeps_its_servers_and_gets_no_more(
    tmp_path: Path, nvidia_smi: NvidiaSmi
) -> None:
    """The other one, whose index changes, stays what it was; what comes back is used again."""
    first, second = card("GPU-a"), card("GPU-b", total=16 * GIB)
    nvidia_smi.shows(first, second)
    one = service(tmp_path, {"a": model("20GiB"), "b": model("12GiB"), "c": model("20GiB")})
    await one.start()
    try:
        admission = Admission(one)
        async with admission.connected():
            admission.say(a=1)
            server = await admission.ready("a")
            nvidia_smi.shows(second)
            await until(one, lambda status: status.devices[0].missing)
            await one.said("0: nvidia-smi doesn't show it any more; what runs on it is kept while it answers")
            admission.say(b=1, c=1)
            await admission.ready("b")
            status = await one.status()
            placed = {item.model: list(item.device_ids) for item in status.instances}
            assert placed == {"a": ["0"], "b": ["1"]}
            assert [device.uuid for device in status.devices] == ["GPU-a", "GPU-b"]
            refused = admission.models["c"]
            assert refused.reason == pb.REASON_NO_CAPACITY
            assert "0 isn't shown by the driver" in refused.message
            assert admission.instance("a") == server
            nvidia_smi.shows(second, first)
            await admission.ready("c")
            status = await one.status()
            assert {item.model: list(item.device_ids) for item in status.instances} == {
                "b": ["1"],
                "c": ["0"],
            }
    finally:
        await one.stop()


async def test_a_server_is_adopted_with_its_card(tmp_path: Path, nvidia_smi: NvidiaSmi) -> None:
    """Its index is another one after a restart, for the card before it has vanished; what was taken back is
    known by its UUID as well."""
    first, second = card("GPU-a"), card("GPU-b", total=16 * GIB)
    nvidia_smi.shows(first, second)
    one = service(tmp_path, {"b": model("12GiB")})
    await one.start()
    try:
        async with Admission(one).connected() as admission, one.stub() as stub:
            admission.say(b=1)
            server = await admission.ready("b")
            await stub.DrainDevice(pb.DrainDeviceRequest(device_id="GPU-a", drain=True), timeout=5)
        await one.kill()
        nvidia_smi.shows(second)
        await one.start()
        status = await one.status()
        assert [(device.device_id, device.draining) for device in status.devices] == [("0", False)]
        (item,) = status.instances
        assert (item.instance_id, item.adopted, list(item.device_ids)) == (server.instance_id, True, ["0"])
    finally:
        await one.stop()


async def test_others_that_take_the_card_evict_nobody(tmp_path: Path, nvidia_smi: NvidiaSmi) -> None:
    """Nothing of ours is ended for it, new starts are refused in numbers; when it falls they start."""
    nvidia_smi.shows(card("GPU-a", used=10 * GIB))
    one = service(tmp_path, {"a": model("10GiB", always_on=True), "b": model("10GiB")})
    await one.start()
    try:
        admission = Admission(one)
        async with admission.connected():
            server = await admission.ready("a")
            nvidia_smi.shows(card("GPU-a", used=24 * GIB))
            await until(one, lambda status: status.devices[0].foreign_mib == 14 * GIB)
            admission.say(b=1)
            refused = await admission.until(
                lambda: admission.models["b"] if admission.models["b"].reason else None
            )
            assert refused.reason == pb.REASON_NO_CAPACITY
            assert "14 GiB used by others" in refused.message
            assert admission.instance("a") == server
            nvidia_smi.shows(card("GPU-a", used=10 * GIB))
            await admission.until(lambda: admission.instance("b"), 30)
            assert admission.instance("a") == server
    finally:
        await one.stop()


async def test_an_operator_takes_a_device_back(tmp_path: Path) -> None:
    """Idle servers end at once, always_on moves, nothing new comes; it is remembered, and given back."""
    two = [{"id": name, "memory": "24GiB", "budget": 1} for name in ("gpu0", "gpu1")]
    models = {"on": model("10GiB", always_on=True), "a": model("14GiB"), "big": model("20GiB")}
    one = service(tmp_path, models, devices=two)
    await one.start()
    try:
        async with one.stub() as stub:
            with pytest.raises(aio.AioRpcError) as refusal:
                await stub.DrainDevice(pb.DrainDeviceRequest(device_id="gpu7", drain=True), timeout=5)
            assert refusal.value.code() is StatusCode.NOT_FOUND
            assert reason_of(refusal.value) == "REASON_NOT_FOUND"
            assert refusal.value.details() == "there is no device 'gpu7'; there are gpu0, gpu1"
        async with Admission(one).connected() as admission:
            await admission.ready("on")
            admission.say(a=1)
            busy = await admission.ready("a")
            before = {item.model: list(item.device_ids) for item in (await one.status()).instances}
            assert before == {"on": ["gpu0"], "a": ["gpu0"]}
            admission.lease(busy.instance_id, 1)
            await until(one, lambda status: any(item.leases for item in status.instances))
            async with one.stub() as stub:
                request = pb.DrainDeviceRequest(device_id="gpu0", drain=True)
                answer = await stub.DrainDevice(request, timeout=5)
                assert (answer.device_id, answer.instances, answer.leases) == ("gpu0", 2, 1)
            await until(
                one,
                lambda status: (
                    [
                        list(item.device_ids)
                        for item in status.instances
                        if item.model == "on" and item.state == pb.INSTANCE_STATE_READY
                    ]
                    == [["gpu1"]]
                ),
            )
            draining = next(item for item in (await one.status()).instances if item.model == "a")
            assert draining.state == pb.INSTANCE_STATE_DRAINING
            assert draining.reason == "gpu0 was taken back by an operator"
            admission.lease(busy.instance_id, 0)
            await admission.gone("a")
            admission.say(big=1)
            refused = await admission.until(
                lambda: admission.models["big"] if admission.models["big"].reason else None
            )
            assert refused.reason == pb.REASON_NO_CAPACITY
            assert "gpu0 was taken back by an operator" in refused.message
        await one.kill()
        await one.start()
        async with Admission(one).connected() as admission:
            status = await one.status()
            assert [device.draining for device in status.devices] == [True, False]
            admission.say(big=1)
            async with one.stub() as stub:
                await stub.DrainDevice(pb.DrainDeviceRequest(device_id="gpu0"), timeout=5)
            await admission.ready("big")
            status = await one.status()
            assert not any(device.draining for device in status.devices)
            assert {item.model: list(item.device_ids) for item in status.instances} == {
                "on": ["gpu1"],
                "big": ["gpu0"],
            }
    finally:
        await one.stop()
