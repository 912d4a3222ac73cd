"""What a simulator is told, checked whole before anything starts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tidegate_simulator.faults import Fault, parse_fault
from tidegate_simulator.flags import build_parser
from tidegate_simulator.ledger import LEDGER_VARIABLE
from tidegate_simulator.sizes import MIB, parse_count

DEFAULT_MODEL = "simulated-model"
DEFAULT_UTILIZATION = 0.92
"""vLLM's own default of --gpu-memory-utilization, a fraction of the device's total."""
_DEFAULT_MAX_MODEL_LEN = 32768


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that shapes one simulator. Durations in seconds, memory in MiB, per device."""

    model: str
    """What `root` says in /v1/models."""
    names: tuple[str, ...]
    """The names served, at least one; answers carry the one asked for."""
    host: str
    port: int
    """0: any free one, told on stderr."""
    uds: str | None
    """A Unix socket's path, in place of host and port."""
    max_model_len: int
    """Tokens of prompt and answer together, at least 1."""
    max_num_seqs: int
    """Requests that run at once, at least 1; more wait."""
    max_num_queued_reqs: int | None
    """Requests that may wait; more are answered 503. None: no limit."""
    utilization: float | None
    """Fraction of each device's total that is claimed, 0 to 1, without vram and kv_cache_bytes."""
    kv_cache_bytes: int | None
    """Claimed beside the weights, where vram isn't set."""
    vram_mib: int | None
    """Claimed on each device, whatever else is set."""
    weights_mib: int
    """The part of a claim that is weights."""
    devices: tuple[str, ...]
    """Indices or uuids; none: the ledger's first."""
    ledger: Path | None
    """None: memory is not accounted for."""
    sleep_mode: bool
    """Whether /sleep and its kin exist: --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1."""
    api_key: str | None
    load_time: float
    open_while_loading: bool
    """Answer 503 while loading, as llama-server does; else the port is closed, as vLLM's."""
    ttft: float
    """From a request's start to its first token."""
    token_rate: float
    """Tokens a second for each request; 0: as fast as possible."""
    default_tokens: int
    """Length of an answer that sets none."""
    log_lines: int
    """Extra lines printed while loading."""
    ignore_sigterm: bool
    shutdown_timeout: float
    """What requests in flight get at SIGTERM before they are cut."""
    shutdown_time: float
    """From the last request's end to the process's."""
    sleep_time: float
    wake_time: float
    sleep_residue_mib: int
    """What a sleeper still holds."""
    keep_alive: float
    """An idle connection is closed after this."""
    worker: str
    """`none`; `child`: a child process holds the memory; `orphan`: and it outlives a killed parent."""
    faults: tuple[Fault, ...]
    start_counter: Path | None
    """A file that counts starts."""
    force_usage: bool
    """Streams end with the usage chunk, asked for or not."""
    echo_request_id: bool
    access_log: bool

    @property
    def kv_tokens(self) -> int:
        """Tokens that the pretended KV cache holds, at 128 KiB a token."""
        if self.kv_cache_bytes is None:
            return self.max_model_len * min(self.max_num_seqs, 16)
        return max(self.max_model_len, self.kv_cache_bytes // (128 * 1024))


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Options:
    """Reads a command line; exits with status 2 and a message where it is wrong.

    Three forms: `serve MODEL ...` as `vllm`'s, where unknown flags are only warned about; `-m FILE ...` as
    llama-server's; and plain flags.
    """
    env = os.environ if environment is None else environment
    serve = bool(arguments) and arguments[0] == "serve"
    parser = build_parser(serve)
    given = [_dashed(argument) for argument in arguments[1 if serve else 0 :]]
    if serve:
        space, unknown = parser.parse_known_args(given)
        if unknown:
            sys.stderr.write(f"WARNING ignored, not known to the simulator: {' '.join(unknown)}\n")
    else:
        space = parser.parse_args(given)
    try:
        return _options(space, serve, env)
    except ValueError as error:
        parser.error(str(error))


def _options(space: argparse.Namespace, serve: bool, env: Mapping[str, str]) -> Options:
    model = getattr(space, "model_tag", None) or space.model or space.model_file or DEFAULT_MODEL
    ledger = space.ledger or env.get(LEDGER_VARIABLE)
    options = Options(
        model=model,
        names=tuple(space.served_model_name or (space.alias.split(",") if space.alias else [model])),
        host=space.host,
        port=space.port,
        uds=space.uds,
        max_model_len=_max_model_len(space.max_model_len),
        max_num_seqs=space.max_num_seqs,
        max_num_queued_reqs=space.max_num_queued_reqs,
        utilization=space.gpu_memory_utilization or (DEFAULT_UTILIZATION if serve else None),
        kv_cache_bytes=parse_count(space.kv_cache_memory_bytes) if space.kv_cache_memory_bytes else None,
        vram_mib=space.vram,
        weights_mib=space.weights,
        devices=_devices(space.device, env),
        ledger=Path(ledger) if ledger else None,
        sleep_mode=space.enable_sleep_mode and env.get("VLLM_SERVER_DEV_MODE") == "1",
        api_key=space.api_key or env.get("VLLM_API_KEY"),
        load_time=space.load_time,
        open_while_loading=space.open_while_loading or space.model_file is not None,
        ttft=space.ttft,
        token_rate=space.token_rate,
        default_tokens=space.default_tokens,
        log_lines=space.log_lines,
        ignore_sigterm=space.ignore_sigterm,
        shutdown_timeout=space.shutdown_timeout,
        shutdown_time=space.shutdown_time,
        sleep_time=space.sleep_time,
        wake_time=space.wake_time,
        sleep_residue_mib=space.sleep_residue,
        keep_alive=space.keep_alive,
        worker=space.worker,
        faults=tuple(parse_fault(text) for text in space.fault),
        start_counter=Path(space.start_counter) if space.start_counter else None,
        force_usage=space.enable_force_include_usage,
        echo_request_id=space.enable_request_id_headers,
        access_log=space.access_log,
    )
    _check(options)
    return options


def _check(options: Options) -> None:
    if options.max_num_seqs < 1 or options.max_model_len < 1 or options.default_tokens < 1:
        raise ValueError("--max-num-seqs, --max-model-len and --default-tokens are at least 1")
    if options.utilization is not None and not 0 < options.utilization <= 1:
        raise ValueError("--gpu-memory-utilization is above 0 and at most 1")
    if min(options.load_time, options.ttft, options.token_rate, options.shutdown_timeout) < 0:
        raise ValueError("durations and rates are at least 0")


def _dashed(argument: str) -> str:
    # vLLM takes --max_model_len for --max-model-len.
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _max_model_len(text: str) -> int:
    return _DEFAULT_MAX_MODEL_LEN if text in ("auto", "-1") else parse_count(text)


def _devices(flag: str | None, env: Mapping[str, str]) -> tuple[str, ...]:
    for text in (flag, env.get("CUDA_VISIBLE_DEVICES"), env.get("TIDEGATE_DEVICES")):
        if text:
            return tuple(name.strip() for name in text.split(",") if name.strip())
    return ()


def memory_claim(options: Options, total_mib: int) -> int:
    """MiB claimed on a device of that size: as vram says, else weights and KV cache, else a fraction of the
    total, as vLLM does; nothing where none is set."""
    if options.vram_mib is not None:
        return options.vram_mib
    if options.kv_cache_bytes is not None:
        return options.weights_mib + options.kv_cache_bytes // MIB
    if options.utilization is not None:
        return int(total_mib * options.utilization)
    return 0
