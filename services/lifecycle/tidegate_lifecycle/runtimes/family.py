"""A model server and all that it started: who belongs to it, and how all of it is ended.

A server is the leader of its session. What it starts stays in the session, unless it leaves on purpose; then
it still carries the instance's id in its environment or writes to its log. Synchronous: called in a thread.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tidegate_lifecycle.runtimes import procfs
from tidegate_lifecycle.runtimes.procfs import Stat
from tidegate_lifecycle.runtimes.records import VARIABLE, Record

Kin = frozenset[tuple[int, int]]
"""Processes, each as (pid, start time)."""


def leads(record: Record) -> bool:
    """The recorded process runs: same boot, same pid, same start time, no zombie."""
    found = _leader(record)
    return found is not None and not found.dead


def watch(record: Record) -> int | None:
    """A pidfd of the recorded process, readable when it ends; None when it doesn't run."""
    try:
        pidfd = os.pidfd_open(record.pid) if record.pid else -1
    except ProcessLookupError:
        return None
    if pidfd >= 0 and leads(record):  # looked at afterwards: so the pidfd isn't that of a successor
        return pidfd
    if pidfd >= 0:
        os.close(pidfd)
    return None


def resolve(intent: Record) -> Record:
    """Completes a record whose writer was killed between starting the process and noting its pid.

    Looks more than once: between its fork and its exec the process carries neither of the marks yet.
    """
    for pause in (0.0, 0.1, 0.4):
        time.sleep(pause)
        bearers = [found for found in procfs.processes() if not found.dead and _marked(found, intent)]
        leaders = [found for found in bearers if found.session == found.pid]
        if leaders:
            first = min(leaders, key=lambda found: found.started)
            return replace(intent, pid=first.pid, started=first.started)
    return intent


def members(record: Record, known: Kin = frozenset()) -> Kin:
    """The living processes of a server.

    1. What was known as one, if it still runs.
    2. The whole session, while its leader is there (a zombie will do): its number can't be another's.
    3. Without a leader, what carries the instance's mark, in the session or out of it. A session of that
       number alone proves nothing: the number may have been given to strangers since.
    """
    if record.boot != procfs.boot_id():
        return frozenset()
    leader = _leader(record)
    found = set()
    for one in procfs.processes():
        if one.dead or one.started < record.started or one.pid == os.getpid():
            continue
        in_session = leader is not None and record.pid in (one.session, one.group)
        if (one.pid, one.started) in known or in_session or _marked(one, record):  # 1, 2, 3
            found.add((one.pid, one.started))
    return frozenset(found)


def ask(record: Record, kin: Kin) -> None:
    """SIGTERM to the group, and to those who left it."""
    _send(record, kin, signal.SIGTERM)


def kill(record: Record, kin: Kin) -> None:
    """SIGKILL to the group, and to those who left it."""
    _send(record, kin, signal.SIGKILL)


def _send(record: Record, kin: Iterable[tuple[int, int]], number: signal.Signals) -> None:
    grouped = _leader(record) is not None
    if grouped:
        try:
            os.killpg(record.pid, number)  # the whole group at once: nobody forks past it
        except (ProcessLookupError, PermissionError):
            grouped = False
    for pid, started in kin:
        found = procfs.stat(pid)
        if found is None or found.started != started or (grouped and found.group == record.pid):
            continue
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            again = procfs.stat(pid)
            if again is not None and again.started == started:
                signal.pidfd_send_signal(pidfd, number)
        except (ProcessLookupError, PermissionError):
            continue
        finally:
            os.close(pidfd)


def _leader(record: Record) -> Stat | None:
    """The recorded process, be it a zombie; None when it is gone. Never for an intent: its pid is 0."""
    if record.pid <= 1 or record.boot != procfs.boot_id():
        return None
    found = procfs.stat(record.pid)
    return found if found is not None and found.started == record.started else None


def _marked(one: Stat, record: Record) -> bool:
    mark = f"{VARIABLE}={record.instance_id}"
    return procfs.has_variable(one.pid, mark) or procfs.writes_to(one.pid, Path(record.log))
