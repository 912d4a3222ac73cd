"""The command line: vLLM's flags, some of llama-server's, and the simulator's own."""

from __future__ import annotations

import argparse

from tidegate_simulator.sizes import parse_mib

# Flags of vLLM and llama-server that a fleet's configuration sets and that change nothing here.
_IGNORED_VALUES = """
    --dtype --tensor-parallel-size -tp --pipeline-parallel-size -pp --data-parallel-size -dp
    --quantization --load-format --download-dir --revision --tokenizer --tokenizer-mode
    --chat-template --seed --block-size --swap-space --cpu-offload-gb --max-num-batched-tokens
    --max-num-queued-tokens --kv-cache-dtype --otlp-traces-endpoint --collect-detailed-traces
    --root-path --runner --task --hf-overrides --limit-mm-per-prompt --compilation-config
    --tool-call-parser --reasoning-parser --uvicorn-log-level --generation-config
    --override-generation-config --speculative-config --disable-access-log-for-endpoints
    --sse-keep-alive-interval --max-log-len --distributed-executor-backend --attention-backend -ngl
    --gpu-layers --n-gpu-layers -b --batch-size -ub --ubatch-size -t --threads --main-gpu
    --tensor-split --cache-type-k --cache-type-v -fa --flash-attn
""".split()  # noqa: SIM905 - so many words read better as words
_IGNORED_SWITCHES = """
    --trust-remote-code --enforce-eager --disable-log-requests --disable-log-stats
    --enable-log-requests --enable-prefix-caching --no-enable-prefix-caching
    --enable-chunked-prefill --enable-auto-tool-choice --disable-uvicorn-access-log
    --enable-server-load-tracking --enable-prompt-tokens-details --async-scheduling
    --no-async-scheduling --language-model-only --jinja --no-webui --metrics --slots --embedding
    --embeddings --reranking --rerank --mlock --no-mmap -cb --cont-batching --no-warmup
""".split()  # noqa: SIM905 - so many words read better as words


def build_parser(serve: bool) -> argparse.ArgumentParser:
    """The parser; `serve` adds vLLM's positional model."""
    parser = argparse.ArgumentParser(prog="tidegate-simulator", description=__doc__, allow_abbrev=False)
    if serve:
        parser.add_argument("model_tag", metavar="MODEL", nargs="?", help="the model's name")
    _model_flags(parser)
    _vllm_flags(parser)
    _pace_flags(parser)
    _memory_flags(parser)
    _fault_flags(parser)
    for flag in _IGNORED_VALUES:
        parser.add_argument(flag, dest="_ignored", help=argparse.SUPPRESS)
    for flag in _IGNORED_SWITCHES:
        parser.add_argument(flag, dest="_ignored", action="store_true", help=argparse.SUPPRESS)
    return parser


def _model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and address").add_argument
    add("--model", help="the model's name")
    add("-m", dest="model_file", metavar="FILE", help="llama-server's model file: 503 while loading")
    add("--alias", "-a", help="llama-server's name for the model")
    add("--served-model-name", nargs="+", metavar="NAME")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0: any free one, told on stderr")
    add("--uds", metavar="PATH", help="a Unix socket, in place of host and port")
    add("--api-key", help="asked for under /v1 and /v2 (default: VLLM_API_KEY)")


def _vllm_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("as vLLM").add_argument
    add("--max-model-len", "-c", "--ctx-size", default="auto", metavar="TOKENS")
    add(
        "--max-num-seqs",
        "-np",
        "--parallel",
        type=int,
        default=256,
        metavar="N",
        help="requests that run at once",
    )
    add("--max-num-queued-reqs", type=int, metavar="N", help="requests that may wait; more get 503")
    add("--enable-sleep-mode", action="store_true", help="/sleep and its kin, with VLLM_SERVER_DEV_MODE=1")
    add("--enable-force-include-usage", action="store_true")
    add("--enable-request-id-headers", action="store_true", help="echo X-Request-Id")
    add("--shutdown-timeout", type=float, default=0.0, metavar="S", help="for requests in flight at SIGTERM")


def _pace_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pace").add_argument
    add("--load-time", type=float, default=0.0, metavar="S", help="from start to the first healthy answer")
    add("--open-while-loading", action="store_true", help="503 while loading; else the port is closed")
    add("--log-lines", type=int, default=0, metavar="N", help="extra lines while loading")
    add("--ttft", type=float, default=0.0, metavar="S", help="from a request's start to its first token")
    add("--token-rate", type=float, default=0.0, metavar="R", help="tokens/s of a request; 0: no limit")
    add("--default-tokens", type=int, default=32, metavar="N", help="length of an answer that sets none")
    add("--sleep-time", type=float, default=0.0, metavar="S")
    add("--wake-time", type=float, default=0.0, metavar="S")
    add(
        "--shutdown-time",
        type=float,
        default=0.0,
        metavar="S",
        help="from the last request's end to the exit",
    )
    add("--keep-alive", type=float, default=5.0, metavar="S", help="an idle connection's life")
    add("--access-log", action="store_true", help="a line for each answer")


def _memory_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("memory").add_argument
    add("--vram", type=parse_mib, metavar="SIZE", help="claimed on each device: MiB, or 10GiB")
    add("--weights", type=parse_mib, default=1024, metavar="SIZE", help="the part that is weights")
    add("--gpu-memory-utilization", type=float, metavar="F", help="claims this fraction, without --vram")
    add("--kv-cache-memory-bytes", "--kv-cache-memory", metavar="BYTES", help="claims this and the weights")
    add("--sleep-residue", type=parse_mib, default=512, metavar="SIZE", help="what a sleeper still holds")
    add("--device", metavar="IDS", help="indices or uuids (default: CUDA_VISIBLE_DEVICES, TIDEGATE_DEVICES)")
    add("--ledger", metavar="PATH", help="who holds what (default: TIDEGATE_SIMULATOR_LEDGER)")
    add("--worker", choices=("none", "child", "orphan"), default="none", help="who holds the memory")


def _fault_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("faults").add_argument
    add(
        "--fault",
        action="append",
        default=[],
        metavar="NAME[=VALUE][,key=value...]",
        help="may be repeated; see the README",
    )
    add("--start-counter", metavar="PATH", help="a file that counts starts, for *-at-start=TIMES")
    add("--ignore-sigterm", action="store_true")
