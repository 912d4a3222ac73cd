"""What vLLM's log says of its memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate_lifecycle.engines.vllm_log import MemoryReport, memory_report, needed_mib

NEW = """
(EngineCore pid=71) INFO [gpu_model_runner.py:2653] Model loading took 15.2683 GiB memory and 4.218 seconds
(EngineCore pid=71) INFO [gpu_worker.py:298] Available KV cache memory: 48.13 GiB
INFO GPU KV cache size: 350,464 tokens, Maximum concurrency for 40,960 tokens per request: 8.56x
""".splitlines()
OLD = """
INFO 05-01 08:00:01 [gpu_model_runner.py:1347] Model loading took 15.2683 GiB and 4.218 seconds
INFO 05-01 08:00:09 [kv_cache_utils.py:634] GPU KV cache size: 350,464 tokens
INFO 05-01 08:00:09 [kv_cache_utils.py:637] Maximum concurrency for 40,960 tokens per request: 8.56x
""".splitlines()
REAL = """
(Worker pid=4676) INFO 11-21 16:11:35 Explicitly set (1.0/9.34) GiB for KV cache on node 0.
(EngineCore pid=4000) INFO [kv_cache_utils.py:2327] CPU KV cache size: 1,048,576 tokens, Maximum concurrency \
for 2,048 tokens per request: 512.00x
""".splitlines()
"""vLLM 0.32 on a CPU, which tells nothing of what it has left."""
TWO_CARDS = """
(Worker_TP0 pid=80) INFO [gpu_model_runner.py:2653] Model loading took 7.64 GiB memory and 4.2 seconds
(Worker_TP1 pid=81) INFO [gpu_model_runner.py:2653] Model loading took 7.70 GiB memory and 4.3 seconds
(Worker_TP0 pid=80) INFO [gpu_worker.py:298] Available KV cache memory: 9.50 GiB
(Worker_TP1 pid=81) INFO [gpu_worker.py:298] Available KV cache memory: 9.25 GiB
INFO [kv_cache_utils.py:1087] GPU KV cache size: 138,000 tokens
INFO [kv_cache_utils.py:1091] Maximum concurrency for 8,192 tokens per request: 16.84x
INFO [kv_cache_utils.py:1087] GPU KV cache size: 134,000 tokens
INFO [kv_cache_utils.py:1091] Maximum concurrency for 8,192 tokens per request: 16.36x
""".splitlines()  # fmt: skip


def test_all_figures_are_read_from_one_line_or_two() -> None:
    """The wording of recent releases and of older ones."""
    new, old = memory_report(NEW), memory_report(OLD)
    assert new == MemoryReport(15635, 49286, 350_464, 40_960, 8.56)
    assert old == MemoryReport(15635, None, 350_464, 40_960, 8.56)
    assert new.one_sequence_mib == 5758
    assert old.one_sequence_mib is None


def test_what_a_real_server_said() -> None:
    """1 GiB for 2 layers × 2 heads × 64 elements of 4 bytes = 1,024 bytes per token."""
    assert memory_report(REAL) == MemoryReport(
        kv_tokens=2**30 // 1024, request_tokens=2048, concurrency=512.0
    )


def test_of_several_cards_the_fullest_counts() -> None:
    """Per card: the most of the weights, the least of the room that is left."""
    report = memory_report(TWO_CARDS)
    assert report == MemoryReport(7885, 9472, 134_000, 8192, 16.36)


@pytest.mark.parametrize("lines", [[], ["Model loading took a while"], ["Available KV cache memory: GiB"]])
def test_a_log_that_says_nothing_gives_nothing(lines: list[str]) -> None:
    """Hints, never required: then what it took counts."""
    assert memory_report(lines) == MemoryReport()
    assert needed_mib(20_000, memory_report(lines), 4) == 20_000


def test_what_a_server_needs_is_what_it_took_without_the_cache_that_nobody_asked_for() -> None:
    """70,000 MiB taken, 49,286 of them KV cache; two sequences of 5,758 MiB are to be kept."""
    assert needed_mib(70_000, memory_report(NEW), 2) == 70_000 - 49_286 + 12_668 + 256
    assert needed_mib(70_000, memory_report(NEW), 256) == 70_000


@given(
    st.integers(1, 200_000),
    st.integers(0, 200_000),
    st.floats(0, 1e6),
    st.integers(1, 1000),
    st.integers(1, 1000),
)
def test_more_sequences_never_need_less_and_never_more_than_was_taken(
    taken: int, kv: int, concurrency: float, few: int, more: int
) -> None:
    """Whatever a log says."""
    report = MemoryReport(kv_mib=kv, concurrency=concurrency)
    low, high = sorted((few, few + more))
    assert 0 < needed_mib(taken, report, low) <= needed_mib(taken, report, high) <= taken
