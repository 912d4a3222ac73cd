"""What a footprint is and holds for, by the pure parts: signatures, samples, bases, old records."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.footprints import old
from tidegate_lifecycle.footprints.apps import App, own_use, parse
from tidegate_lifecycle.footprints.need import needed
from tidegate_lifecycle.footprints.record import reserve, signature
from tidegate_lifecycle.footprints.scene import Reading, base, check, others
from tidegate_lifecycle.footprints.verdict import Discarded, Sample, agreement, verdict
from tidegate_lifecycle.instance import Instance, InstanceState

VLLM = Model("m", engine="vllm", source="org/m", max_model_len=4096, max_num_seqs=8)
H200 = "NVIDIA H200"


SHAPING: dict[str, Any] = {
    "engine": "llamacpp",
    "command": ("x",),
    "image": "vllm/vllm-openai:v0.20",
    "executable": "/opt/vllm",
    "source": "org/other",
    "extra_args": ("--enforce-eager",),
    "env": {"VLLM_ATTENTION_BACKEND": "FLASHINFER"},
    "max_model_len": 8192,
    "max_num_seqs": 9,
    "kv_reservation_seqs": 2,
    "kv_cache_dtype": "fp8",
    "dtype": "float16",
    "quantization": "fp8",
    "vram_mib": 20_000,
    "vram_share": 0.5,
}
OTHERS = """
  name aliases upstream_model request_defaults pool max_concurrent max_queue idle_timeout always_on instances
  start_timeout health_path tokenizer volumes urls tensor_parallel_size
"""
"""What takes no memory; of the cards, their kind and number count, wherever they are."""


def test_every_setting_of_a_model_is_considered() -> None:
    """A new one either shapes memory, and is in the signature, or it doesn't."""
    assert {field.name for field in fields(Model)} == {*SHAPING, *OTHERS.split()}


@pytest.mark.parametrize("name", SHAPING)
def test_what_shapes_memory_is_in_the_signature(name: str) -> None:
    """Each of them makes another footprint."""
    assert signature(replace(VLLM, **{name: SHAPING[name]}), H200, 1) != signature(VLLM, H200, 1)


def test_sequences_that_vllm_is_told_are_in_the_signature() -> None:
    """Without a number of its own they follow the requests that it may have at once."""
    free = replace(VLLM, max_num_seqs=None)
    assert signature(replace(free, max_concurrent=5000), H200, 1) != signature(free, H200, 1)


def test_what_takes_no_memory_is_not() -> None:
    """Names, limits, times and tokens; and what was declared, where nothing fills its share."""
    same = replace(
        VLLM,
        name="other",
        aliases=("x",),
        upstream_model="y",
        idle_timeout=1.0,
        max_queue=3,
        start_timeout=5.0,
        env={"HF_TOKEN": "hf_x"},
    )
    assert signature(same, H200, 1) == signature(VLLM, H200, 1)
    llama = replace(VLLM, engine="llamacpp")
    assert signature(replace(llama, vram_mib=1), H200, 1) == signature(llama, H200, 1)


def test_cards_are_in_the_signature() -> None:
    """Their kind and their number."""
    assert len({signature(VLLM, H200, 1), signature(VLLM, H200, 2), signature(VLLM, "NVIDIA A100", 1)}) == 3


def test_the_reserve_never_makes_a_model_unplaceable() -> None:
    """5 % and 256 MiB at least beyond what was measured, but no more than it ran with."""
    assert reserve(1000, 24_000) == 1256
    assert reserve(20_000, 24_000) == 21_000
    assert reserve(20_000, 20_500) == 20_500
    assert reserve(21_000, 20_500) == 20_500


def samples(*own: int | None, used: int = 9000, total: int = 24_576) -> list[Sample]:
    return [Sample(total, used, one) for one in own]


def test_the_median_per_card_and_the_most_of_them() -> None:
    """An outlier within the tolerance doesn't move it; two cards aren't added up."""
    taken = verdict({"0": samples(5000, 5002, 5060), "1": samples(5100, 5100, 5100)}, None, 0.9)
    assert (taken.mib, taken.confidence, taken.samples, taken.attributed) == (5100, 1.0, 3, True)


def test_the_difference_where_one_sample_has_no_attribution() -> None:
    """Then all are differences to the base."""
    cards = {"0": [Sample(24_576, 6000, 4000), Sample(24_576, 6010, None), Sample(24_576, 6020, 4000)]}
    taken = verdict(cards, {"0": 1000}, 0.9)
    assert (taken.mib, taken.attributed) == (5010, False)


@pytest.mark.parametrize(
    ("cards", "base_used", "kind", "again"),
    [
        ({"0": samples(None, None, None)}, None, "no_base", False),
        ({"0": samples(0, 0, 0)}, None, "implausible", True),
        ({"0": samples(5000, 0, 5000)}, None, "implausible", True),
        ({"0": samples(30_000, 30_000, 30_000)}, None, "implausible", True),
        ({"0": samples(None, None, used=900)}, {"0": 1000}, "implausible", True),
        ({"0": samples(1000, 2000, 3000, used=3000)}, None, "changed", True),
        ({"0": samples(None, used=4000) + samples(None, used=6000)}, {"0": 0}, "spread", True),
        ({"0": samples(5000, 5000), "1": samples(0, 0)}, None, "implausible", True),
    ],
)
def test_what_is_no_footprint(
    cards: dict[str, list[Sample]], base_used: dict[str, int] | None, kind: str, again: bool
) -> None:
    """Nothing, less than nothing, more than there is, what moved, and what nobody can tell."""
    with pytest.raises(Discarded) as reason:
        verdict(cards, base_used, 0.9)
    assert (reason.value.kind, reason.value.again) == (kind, again)


def test_agreement() -> None:
    """1 within the tolerance, 0 when the samples differ by their median, never less."""
    assert agreement([5000, 5064]) == 1.0
    assert agreement([1000, 1164]) == pytest.approx(1 - 100 / 1082, abs=1e-4)
    assert agreement([1, 10_000]) == 0.0


def instance(name: str, state: InstanceState, *cards: str, ready_at: float | None = None) -> Instance:
    """A server on these cards."""
    return Instance(name, "m", cards, 1000, 0.0, state, ready_at=ready_at)


def test_the_base_is_from_after_the_last_change_of_each_card() -> None:
    """One reading is too old, one is from before a neighbour was ready, one from before a server ended."""
    own = instance("own", InstanceState.STARTING, "0", "1")
    there = instance("b", InstanceState.READY, "1", ready_at=50.0)
    readings = {"0": Reading(100, 60.0), "1": Reading(900, 55.0)}
    found = base(own, [own, there], readings, {"0": 40.0}, 70.0)
    assert found is not None
    assert (found.used, found.began) == ({"0": 100, "1": 900}, 55.0)
    assert found.holds(others(own.devices, [own, there], "own"), {"0": 40.0})
    assert not found.holds(others(own.devices, [own], "own"), {})
    assert not found.holds(found.others, {"1": 80.0})
    assert base(own, [own, there], readings, {"0": 60.0}, 70.0) is None
    assert base(own, [own, there], readings, {}, 200.0) is None
    there.ready_at = 56.0
    assert base(own, [own, there], readings, {}, 70.0) is None
    there.ready_at, there.state = 50.0, InstanceState.STOPPING
    assert base(own, [own, there], readings, {}, 70.0) is None
    assert base(own, [own], {"0": Reading(1, 60.0)}, {}, 70.0) is None


def test_a_measurement_ends_with_a_change_on_its_cards() -> None:
    """A neighbour that came, went, slept, or came and went between two looks; and its own end."""
    own, far = instance("own", InstanceState.READY, "0"), instance("c", InstanceState.STARTING, "1")
    there = instance("b", InstanceState.READY, "0")
    around = others(own.devices, [own, there, far], "own")
    check(own, [own, there, far], {"0": 9.0, "1": 99.0}, 10.0, around)
    there.state = InstanceState.DRAINING
    check(own, [own, there, far], {}, 10.0, around)
    with pytest.raises(Discarded, match="another server ended on 0"):
        check(own, [own, there], {"0": 10.0}, 10.0, around)
    with pytest.raises(Discarded, match="the servers on the same card changed"):
        check(own, [own], {}, 10.0, around)
    there.state = InstanceState.SLEEPING
    with pytest.raises(Discarded, match="the servers on the same card changed"):
        check(own, [own, there], {}, 10.0, around)
    there.state = InstanceState.STOPPING
    with pytest.raises(Discarded, match="b is stopping on the same card"):
        check(own, [own, there], {}, 10.0, around)
    own.state = InstanceState.STOPPING
    with pytest.raises(Discarded, match="doesn't run any more"):
        check(own, [own], {}, 10.0, around)


def test_lines_of_processes() -> None:
    """What the driver doesn't tell of one of ours makes all of it unknown; of strangers it doesn't matter."""
    text = "GPU-a, 11, 1000\nGPU-a, 12, 500 MiB\nGPU-b, 11, 7\nGPU-a, 13, [N/A]\nNo running processes found\n"
    found = parse(text)
    assert found[1] == App("GPU-a", 12, 500)
    assert own_use(found, "GPU-a", {11, 12, 99}) == 1500
    assert own_use(found, "GPU-a", {11, 13}) is None
    assert own_use(found, "GPU-a", {99}) is None
    assert own_use(parse("\x00garbage,,\n,,,\n"), "GPU-a", {11}) is None


LOG = [
    "INFO Model loading took 14.2 GiB and 5 s",
    "INFO Available KV cache memory: 40.00 GiB",
    "INFO GPU KV cache size: 327,680 tokens",
    "INFO Maximum concurrency for 4,096 tokens per request: 80.00x",
]


def test_vllm_needs_less_than_it_took() -> None:
    """Without the cache that nobody asked for, by its log; else what it took, if an amount was asked for."""
    assert needed(VLLM, 60_000, LOG, asked=False) < 30_000
    assert needed(VLLM, 60_000, [], asked=True) == 60_000
    with pytest.raises(Discarded, match="it fills the whole card") as reason:
        needed(VLLM, 60_000, [], asked=False)
    assert not reason.value.again
    assert needed(replace(VLLM, engine="command"), 60_000, LOG, asked=False) == 60_000


def record(**change: object) -> dict[str, Any]:
    """As vllm_gateway writes it."""
    stamp = {"mode": "budget", "max_model_len": 4096, "max_num_seqs": 8, "effective_tp": 1, "util_basis": 0.0}
    return {
        "per_gpu_mib": 19882.0,
        "effective_tp": 1,
        "effective_util": 0.83,
        "measured_at": 1.7e9,
        "signature": {**stamp, **change},
    }


def test_records_of_the_old_gateway() -> None:
    """Both forms are read; what is none is said."""
    text = json.dumps(
        {"a/new": record(), "a/first": 8000, "a/zero": 0, "a/odd": "x", "a/tp": {"per_gpu_mib": 1}}
    )
    found, odd = old.read(text)
    assert [(one.source, one.mib, one.count, one.at) for one in found] == [
        ("a/new", 19882, 1, 1.7e9),
        ("a/first", 8000, 1, 0.0),
        ("a/tp", 1, 1, 0.0),
    ]
    assert [line.split(":")[0] for line in odd] == ["a/zero", "a/odd"]
    for text in ("[]", "nonsense", "[" * 100_000, '"x"'):
        with pytest.raises(ValueError, match="it is no JSON"):
            old.read(text)


@pytest.mark.parametrize(
    ("value", "model", "why"),
    [
        (record(), VLLM, ""),
        (record(mode="whole_card"), VLLM, "the share that it was given"),
        (record(max_model_len=8192), VLLM, "max_model_len 8192, m has 4096"),
        (record(max_num_seqs=16), VLLM, "max_num_seqs 16, m has 8"),
        (record(max_model_len=0), replace(VLLM, max_model_len=None), ""),
        (record(), replace(VLLM, tensor_parallel_size=2), "over 1 cards, m is over 2"),
        (8000, VLLM, "no signature"),
        (8000, replace(VLLM, engine="llamacpp"), ""),
    ],
)
def test_which_of_them_hold(value: object, model: Model, why: str) -> None:
    """Only what was measured as the model is configured now."""
    (one,), _ = old.read(json.dumps({"org/m": value}))
    found = old.mismatch(one, model)
    assert why in found
    assert bool(why) == bool(found)
