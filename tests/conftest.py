"""Options of the whole suite: what is skipped by default, and a way to forbid any other skip."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.support import containers
from tests.support.depth import SLOW
from tests.support.guard import callbacks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes minutes")
    parser.addoption("--seed", type=int, help="randomised tests run with this seed alone")
    parser.addoption(
        "--callbacks", action="store_true", help="tell the longest callback of each service, in CPU time"
    )
    parser.addoption("--no-skips", action="store_true", help="a skip for something missing is a failure")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background: what is started
        signal.signal(signal.SIGINT, signal.default_int_handler)  # by tests would inherit it
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody is there; some tests have a hub of their own
    if config.getoption("--slow"):
        os.environ[SLOW] = "1"
    if config.getoption("--callbacks") and callbacks.FOLDER not in os.environ:  # the workers inherit it
        os.environ[callbacks.FOLDER] = tempfile.mkdtemp(prefix="tidegate-callbacks-")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--callbacks"):
        for service, (took, what) in callbacks.longest(Path(os.environ[callbacks.FOLDER])).items():
            terminalreporter.write_line(f"longest callback of {service}: {took * 1000:.1f} ms in {what}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselected = [item for item in items if _left_out(item, config)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


def _left_out(item: pytest.Item, config: pytest.Config) -> bool:
    if item.get_closest_marker("slow") and not config.getoption("--slow"):
        return True
    if item.get_closest_marker("vllm") and not os.environ.get("TIDEGATE_TEST_VLLM"):
        return True
    return item.get_closest_marker("gpu") is not None and shutil.which("nvidia-smi") is None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("docker") and (reason := containers.why_not()):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--no-skips") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"
    return report
