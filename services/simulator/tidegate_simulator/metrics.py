"""/metrics, in Prometheus' text format and under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterator

from tidegate_simulator.state import Simulator

_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
_REASONS = ("stop", "length", "abort")


def exposition(simulator: Simulator) -> str:
    """The whole page."""
    return "\n".join(_lines(simulator)) + "\n"


def _lines(simulator: Simulator) -> Iterator[str]:
    engine = simulator.engine
    labels = f'model_name="{simulator.options.names[0]}",engine="0"'
    gauges = {
        "num_requests_running": len(engine.running),
        "num_requests_waiting": len(engine.waiting),
        "kv_cache_usage_perc": engine.kv_usage,
    }
    for name, value in gauges.items():
        yield f"# TYPE vllm:{name} gauge"
        yield f"vllm:{name}{{{labels}}} {float(value)}"
    yield "# TYPE vllm:num_requests_waiting_by_reason gauge"
    yield f'vllm:num_requests_waiting_by_reason{{{labels},reason="capacity"}} {float(len(engine.waiting))}'
    yield "# TYPE vllm:engine_sleep_state gauge"
    for level, state in enumerate(_SLEEP_STATES):
        yield f'vllm:engine_sleep_state{{{labels},sleep_state="{state}"}} {float(level == engine.level)}'
    yield from _counters(simulator, labels)
    histograms = {
        "time_to_first_token_seconds": engine.first_token,
        "e2e_request_latency_seconds": engine.whole,
        "request_queue_time_seconds": engine.queued,
    }
    for name, histogram in histograms.items():
        yield f"# TYPE vllm:{name} histogram"
        yield from histogram.lines(f"vllm:{name}", labels)


def _counters(simulator: Simulator, labels: str) -> Iterator[str]:
    totals = simulator.engine.totals
    for name, total in (
        ("prompt_tokens", totals["prompt_tokens"]),
        ("generation_tokens", totals["generation_tokens"]),
        ("num_preemptions", 0),
    ):
        yield f"# TYPE vllm:{name} counter"
        yield f"vllm:{name}_total{{{labels}}} {float(total)}"
    yield "# TYPE vllm:admission_rejections counter"
    reason = 'reason="max_num_queued_reqs"'
    yield f"vllm:admission_rejections_total{{{labels},{reason}}} {float(totals['rejections'])}"
    yield "# TYPE vllm:request_success counter"
    for reason in _REASONS:
        ended = float(totals[f"success:{reason}"])
        yield f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {ended}'
