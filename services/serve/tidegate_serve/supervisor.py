"""`tidegate serve`: the three services as child processes, restarted when they die, stopped together.

The children hold the reading end of a pipe, their lifeline: however this process ends, they notice and stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path

from tidegate_chassis.config import EXIT_CONFIG, Document, read
from tidegate_chassis.process import LIFELINE, Terminal, monotonic
from tidegate_serve import rundir
from tidegate_serve.check import SERVICES, find_problems

DRAIN = 6.0
"""Seconds that the edge gets to end its requests (it cuts what runs after 5) before it is killed."""
STOP = 9.0
"""Seconds that lifecycle gets, beside the edge, to drain and stop the model servers before they are swept."""
LONG = 60.0
"""Seconds after which a service has started, whatever is known of it."""
SWEEP = 5.0
"""Seconds for the sweep of model servers that a lifecycle left behind when it died."""


def serve(config: str) -> int:
    """Runs until SIGINT or SIGTERM; returns the exit status (78 for a bad configuration)."""
    problems = find_problems(config)
    for problem in problems:
        print(f"tidegate: {problem}", file=sys.stderr)
    if any(not problem.warning for problem in problems):
        return EXIT_CONFIG
    with rundir.made() as directory:
        return asyncio.run(Supervisor(read(config), Path(directory)).run())


@dataclass
class Child:
    """One service's process, as long as `serve` lives."""

    service: str
    process: asyncio.subprocess.Process | None = None
    settled: bool = False
    """It has started, or run for long: an exit now is a crash, not a refusal to start."""
    deaths: int = 0

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal if the process runs."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class Supervisor:
    """Starts, restarts and stops the three services."""

    def __init__(self, document: Document, directory: Path) -> None:
        self._document = document
        addresses = _addresses(document, directory)
        rundir.record(directory, document.path, addresses)
        self._environment = os.environ | {
            f"TIDEGATE_{name.upper()}__LISTEN": addresses[name] for name in addresses
        }
        self._children = {service: Child(service) for service in SERVICES}
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._status = 0
        self._lifeline, self._lifeline_end = os.pipe()

    async def run(self) -> int:
        """Until told to stop; then everything has ended, model servers too."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup, Terminal())
        keepers = {name: asyncio.create_task(self._keep(child)) for name, child in self._children.items()}
        greeter = asyncio.create_task(self._greet())
        await self._stop.wait()
        greeter.cancel()
        for keeper in keepers.values():
            keeper.cancel()
        await asyncio.gather(*keepers.values(), return_exceptions=True)
        await self._end_all()
        return self._status

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _on_hangup(self, terminal: Terminal) -> None:
        """The services are told to read their configuration again; with its terminal this process ends."""
        if terminal.closed():
            self._on_signal()
            return
        for child in self._children.values():
            if child.process is not None and _handles(child.process.pid, signal.SIGHUP):
                child.signal(signal.SIGHUP)

    async def _keep(self, child: Child) -> None:
        """Starts a service, and again whenever it ends, sooner after the first death than after the fifth.

        A service that refuses its configuration when it is first started ends everything with its status.
        """
        while True:
            started = monotonic()
            process = child.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                f"tidegate_{child.service}",
                "--config",
                str(self._document.path),
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environment | {LIFELINE: str(self._lifeline)},
                pass_fds=[self._lifeline],
                start_new_session=True,  # a terminal's Ctrl-C is for this process; it stops them in order
            )
            status = await process.wait()
            lived = monotonic() - started
            child.settled = child.settled or lived > LONG
            if status == EXIT_CONFIG and not child.settled:
                self._status = EXIT_CONFIG
                self._stop.set()
                return
            child.deaths = 1 if lived > 30 else child.deaths + 1
            delay = min(5.0, 0.1 * 2 ** (child.deaths - 1))
            print(
                f"tidegate: {child.service} ended ({_ending(status)}); it is started again in {delay:.1f} s",
                file=sys.stderr,
            )
            await asyncio.sleep(delay)

    async def _greet(self) -> None:
        """Says once that requests can be sent."""
        listen = self._document.section("edge").get("listen", "127.0.0.1:8080")
        listen = os.environ.get("TIDEGATE_EDGE__LISTEN", listen)
        host, _, port = str(listen).rpartition(":")
        if port == "0":
            return
        files = self._document.section("edge").get("tls")
        https = _trusting() if isinstance(files, dict) and files.get("cert") else None
        while not await _is_ready(host.strip("[]"), int(port), https):  # noqa: ASYNC110 - asks another process
            await asyncio.sleep(0.1)
        for child in self._children.values():
            child.settled = True
        scheme = "https" if https else "http"
        print(f"tidegate: ready on {scheme}://{listen}  (Ctrl-C stops everything)", file=sys.stderr)

    async def _end_all(self) -> None:
        """The edge ends its requests while lifecycle drains the model servers, which needs admission; so that
        goes last. Each has a deadline, after which it is killed. What a dead lifecycle left is swept."""
        _, stopped = await asyncio.gather(self._end("edge", DRAIN), self._end("lifecycle", STOP))
        await self._end("admission", 1.0)
        if not stopped:
            await self._sweep()
        os.close(self._lifeline)
        os.close(self._lifeline_end)

    async def _end(self, service: str, patience: float) -> bool:
        """Ends one service; False if it did not end by itself in good order."""
        child = self._children[service]
        if child.process is None or child.process.returncode is not None:
            return False
        child.signal(signal.SIGTERM)
        waits = {asyncio.create_task(child.process.wait()), asyncio.create_task(self._hurry.wait())}
        _, pending = await asyncio.wait(waits, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()
        if child.process.returncode is None:
            child.signal(signal.SIGKILL)
            await child.process.wait()
            return False
        return child.process.returncode == 0

    async def _sweep(self) -> None:
        sweep = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tidegate_lifecycle",
            "--config",
            str(self._document.path),
            "--sweep",
            stdin=asyncio.subprocess.DEVNULL,
            env=self._environment,
            start_new_session=True,
        )
        try:
            await asyncio.wait_for(sweep.wait(), SWEEP)
        except TimeoutError:
            print("tidegate: model servers may be left; the next start takes care of them", file=sys.stderr)


def _addresses(document: Document, directory: Path) -> dict[str, str]:
    """Where the inner services listen: a Unix socket, unless the file or the environment has an address."""
    return {
        service: str(document.section(service).get("listen") or f"unix:{directory / service}.sock")
        for service in ("admission", "lifecycle")
    }


def _trusting() -> ssl.SSLContext:
    """For asking a process of our own: its certificate names others' way to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _is_ready(host: str, port: int, https: ssl.SSLContext | None) -> bool:
    writer = None
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(host, port, ssl=https)
            writer.write(b"GET /ready HTTP/1.1\r\nHost: tidegate\r\nConnection: close\r\n\r\n")
            return b" 200 " in await reader.readline()
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()


def _handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, by the kernel. One that is still starting has none,
    and would end by it; it reads the configuration anyway."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def _ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
