"""One simulator's life: it loads, serves, and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

from aiohttp import web
from aiohttp.web_log import AccessLogger

from tidegate_simulator.app import build
from tidegate_simulator.engine import Engine
from tidegate_simulator.faults import Faults
from tidegate_simulator.logs import plain, say
from tidegate_simulator.memory import Memory, TooLittleMemory, out_of_memory_line
from tidegate_simulator.operations import VERSION
from tidegate_simulator.options import Options
from tidegate_simulator.sizes import gib
from tidegate_simulator.state import Simulator

_BACKLOG = 2048


class StartFailed(Exception):
    """The model can't be served; the text is the last line printed."""


class Server:
    """Runs one simulator until it is told to stop or its engine dies."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._stop = asyncio.Event()
        self._status = 0
        self._memory = Memory(options)
        self._simulator = Simulator(
            options, Engine(options), Faults(options.faults), self._memory, self._engine_died
        )
        self._runner = web.AppRunner(
            build(self._simulator),
            keepalive_timeout=options.keep_alive,
            handler_cancellation=True,
            access_log_class=_AccessLog,
            access_log=logging.getLogger(__name__) if options.access_log else None,
        )

    async def run(self) -> int:
        """From start to end; the process's exit status."""
        self._take_signals()
        say(f"vLLM API server version {VERSION} (simulated), model {self._options.model}")
        try:
            listener = self._bind()
        except OSError as error:
            plain(f"OSError: {error}")
            return 1
        with listener:
            try:
                await self._runner.setup()
                await self._live(listener)
            except (StartFailed, TooLittleMemory, LookupError) as error:
                _print_failure(str(error))
                self._status = 1
            finally:
                await self._end()
        return self._status

    async def _live(self, listener: socket.socket) -> None:
        if self._options.open_while_loading:
            await self._listen(listener)
        await self._load()
        if not self._stop.is_set():
            await self._serve(listener)

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            if number == signal.SIGTERM and self._options.ignore_sigterm:
                loop.add_signal_handler(number, say, "SIGTERM ignored, as asked")
            else:
                loop.add_signal_handler(number, self._stop.set)

    def _bind(self) -> socket.socket:
        """Takes the address before loading, as vLLM does: taken by another it fails at once. Nobody is let in
        until the socket listens."""
        if self._options.uds:
            with suppress(FileNotFoundError):
                os.unlink(self._options.uds)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self._options.uds)
            return listener
        family = socket.AF_INET6 if ":" in self._options.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._options.host, self._options.port))
        return listener

    async def _load(self) -> None:
        options = self._options
        fault = self._simulator.faults.at_start(_count_start(options.start_counter))
        name = fault.fault if fault else ""
        if name == "hang-at-start":
            say("Loading weights...")
            await self._stop.wait()
            return
        self._memory.start()
        if name not in ("exit-at-start", "oom-at-start"):
            say(f"Starting to load model {options.model}...", place="gpu_model_runner.py:3338")
        for line in range(options.log_lines):
            say(f"Loading safetensors checkpoint shards: {line + 1}/{options.log_lines}")
            await self._pause(options.load_time / options.log_lines)
        if not options.log_lines:
            await self._pause(options.load_time)
        if name == "exit-at-start":
            raise StartFailed("RuntimeError: Engine core initialization failed. See root cause above.")
        if name == "oom-at-start":
            raise StartFailed(out_of_memory_line())
        self._say_loaded()

    def _say_loaded(self) -> None:
        options, held = self._options, self._memory.held_mib
        weights = min(options.weights_mib, held)
        cache = held - weights
        seconds = options.load_time
        most = options.kv_tokens / options.max_model_len
        say(
            f"Model loading took {gib(weights)} GiB memory and {seconds:.6f} seconds",
            place="gpu_model_runner.py:3421",
        )
        say(f"Available KV cache memory: {gib(cache)} GiB", place="gpu_worker.py:349")
        say(
            f"GPU KV cache size: {options.kv_tokens:,} tokens, Maximum concurrency for "
            f"{options.max_model_len:,} tokens per request: {most:.2f}x",
            place="kv_cache_utils.py:1305",
        )
        say("Graph capturing finished in 0 secs, took 0.00 GiB", place="gpu_model_runner.py:4285")
        say(f"init engine (profile, create kv cache, warmup model) took {seconds:.2f} s", place="core.py:250")

    async def _serve(self, listener: socket.socket) -> None:
        self._simulator.loaded = True
        if not self._options.open_while_loading:
            await self._listen(listener)
        plain("INFO:     Application startup complete.")
        await self._stop.wait()

    async def _listen(self, listener: socket.socket) -> None:
        plain(f"INFO:     Started server process [{os.getpid()}]")
        await web.SockSite(self._runner, listener, backlog=_BACKLOG).start()
        plain(f"Listening on {_address(listener)}")

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def _end(self) -> None:
        """Nobody more is let in; requests in flight get their time, then they are cut."""
        plain("INFO:     Shutting down")
        engine = self._simulator.engine
        engine.stopping = True
        for site in list(self._runner.sites):
            await site.stop()
        await engine.drained(self._options.shutdown_timeout)
        server = self._runner.server
        for connection in server.connections if server else ():
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(self._options.shutdown_time)
        await self._runner.cleanup()
        self._memory.close()
        plain("INFO:     Application shutdown complete.")

    def _engine_died(self, line: str) -> None:
        _print_failure(line)
        self._status = 1
        # The answer to the request that killed it still goes out.
        asyncio.get_running_loop().call_later(0.05, self._stop.set)


class _AccessLog(AccessLogger):
    """uvicorn's line for an answer."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        plain(f'INFO:     {request.remote} - "{request.method} {request.path_qs} HTTP/1.1" {response.status}')

    @property
    def enabled(self) -> bool:
        return True


def _count_start(path: Path | None) -> int:
    """This start's number, from 1; kept in the file, so that it counts over processes."""
    if path is None:
        return 1
    with suppress(FileNotFoundError, ValueError):
        number = int(path.read_text()) + 1
        path.write_text(str(number))
        return number
    path.write_text("1")
    return 1


def _address(listener: socket.socket) -> str:
    name = listener.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"


def _print_failure(last: str) -> None:
    say("EngineCore failed to start.", level="ERROR", place="core.py:936")
    plain("Traceback (most recent call last):")
    plain('  File "vllm/v1/engine/core.py", line 927, in run_engine_core')
    plain("    engine_core = EngineCoreProc(*args, engine_index=dp_rank, **kwargs)")
    plain('  File "vllm/v1/worker/gpu_worker.py", line 213, in load_model')
    plain("    self.model_runner.load_model(eep_scale_up=eep_scale_up)")
    plain(last)
