"""What goes wrong on purpose, and when. Decides only; `sabotage` acts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

REQUEST_FAULTS = frozenset({"refuse", "hang", "garbage", "status", "slow-headers"})
"""Strike before a request is handled; `after` is the number of requests let past first."""
CHUNK_FAULTS = frozenset({"die-after", "cut-after", "stall-after", "error-after", "mid-utf8"})
"""Strike in the middle of an answer; `after` is the number of chunks with text that go out first."""
END_FAULTS = frozenset({"no-done"})
"""Strike at the end of a stream; `after` is the number of streams let past first."""
START_FAULTS = frozenset({"exit-at-start", "oom-at-start", "hang-at-start"})
"""Strike while the model loads; `times` is the number of starts, counted in the start counter's file."""
HEALTH_FAULTS = frozenset({"unhealthy"})
"""`/health` answers 503; `after` is in seconds from when the fault was set."""
ALL_FAULTS = REQUEST_FAULTS | CHUNK_FAULTS | END_FAULTS | START_FAULTS | HEALTH_FAULTS

# What the VALUE of `--fault NAME=VALUE` means where it is not `after`.
_MAIN_FIELD = {
    "status": "code",
    "slow-headers": "delay",
    "exit-at-start": "times",
    "oom-at-start": "times",
    "hang-at-start": "times",
}


@dataclass(slots=True)
class Fault:
    """One thing that goes wrong."""

    fault: str
    """Its name, one of ALL_FAULTS."""
    after: float = 0
    """What comes first: requests, chunks or seconds, by the kind of fault. At least 0."""
    times: int | None = None
    """How often it strikes; None: until cleared."""
    path: str | None = None
    """Only this path; `*` any path; None: the routes that run the model."""
    code: int = 503
    """`status`: the HTTP status answered, 400 to 599."""
    retry_after: str | None = None
    """`status`: the Retry-After header, as it is."""
    delay: float = 1.0
    """`slow-headers`: seconds before the handling begins."""
    struck: int = 0
    """How often it has struck."""
    passed: int = 0
    """How many requests or streams it has let past."""
    since: float = field(default=0.0, repr=False)
    """Monotonic seconds when it was set."""

    def covers(self, path: str, serving: bool) -> bool:
        """Whether it is about this path; `serving` says that the path runs the model."""
        return serving if self.path is None else self.path in ("*", path)

    @property
    def spent(self) -> bool:
        """Whether it has struck as often as it may."""
        return self.times is not None and self.struck >= self.times


def parse_fault(text: str) -> Fault:
    """Reads `NAME[=VALUE][,key=value...]`, e.g. `cut-after=3,times=1`. Raises ValueError."""
    head, *rest = text.split(",")
    name, _, value = head.partition("=")
    fields: dict[str, Any] = {"fault": name}
    if value:
        fields[_MAIN_FIELD.get(name, "after")] = value
    for item in rest:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} in fault {text!r} is not key=value")
        fields[key] = value
    return fault_from(fields)


def fault_from(fields: Mapping[str, Any]) -> Fault:
    """Reads a fault from JSON's or the command line's fields. Raises ValueError with what is wrong."""
    readers: dict[str, Callable[[Any], Any]] = {
        "fault": str,
        "after": float,
        "times": lambda value: None if value is None else int(value),
        "path": lambda value: None if value is None else str(value),
        "code": int,
        "retry_after": lambda value: None if value is None else str(value),
        "delay": float,
    }
    unknown = set(fields) - set(readers)
    if unknown:
        raise ValueError(f"a fault has no field {', '.join(sorted(unknown))}")
    try:
        fault = Fault(**{key: readers[key](value) for key, value in fields.items()})
    except TypeError as error:
        raise ValueError(f"bad fault: {error}") from error
    if fault.fault not in ALL_FAULTS:
        raise ValueError(f"no fault {fault.fault!r}; there are {', '.join(sorted(ALL_FAULTS))}")
    if not 100 < fault.code < 600 or fault.after < 0 or fault.delay < 0:
        raise ValueError("a fault's code is a status, its after and delay are at least 0")
    return fault


class Faults:
    """The faults now set. Several may be: the first that is due strikes."""

    def __init__(self, faults: tuple[Fault, ...] = (), now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._faults: list[Fault] = []
        for fault in faults:
            self.add(fault)

    def __repr__(self) -> str:
        return f"Faults({self._faults})"

    def add(self, fault: Fault) -> None:
        """Sets a fault; its count begins now."""
        fault.since = self._now()
        self._faults.append(fault)

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        self._faults.clear()

    def snapshot(self) -> list[dict[str, Any]]:
        """The faults set, with how often each has struck."""
        return [asdict(fault) for fault in self._faults]

    def at_request(self, path: str, serving: bool) -> Fault | None:
        """The fault that strikes this request before it is handled."""
        return self._counted(REQUEST_FAULTS, path, serving)

    def at_end(self, path: str) -> Fault | None:
        """The fault that strikes the end of this stream."""
        return self._counted(END_FAULTS, path, serving=True)

    def at_chunk(self, path: str, sent: int) -> Fault | None:
        """The fault that strikes when `sent` chunks with text have gone out."""
        for fault in self._faults:
            if (
                fault.fault in CHUNK_FAULTS
                and not fault.spent
                and fault.covers(path, True)
                and sent >= fault.after
            ):
                fault.struck += 1
                return fault
        return None

    def any_at_chunks(self) -> bool:
        """Whether answers must be counted chunk by chunk."""
        return any(fault.fault in CHUNK_FAULTS and not fault.spent for fault in self._faults)

    def unhealthy(self) -> bool:
        """Whether `/health` says 503 now."""
        for fault in self._faults:
            if fault.fault in HEALTH_FAULTS and not fault.spent and self._now() >= fault.since + fault.after:
                fault.struck += 1
                return True
        return False

    def at_start(self, start: int) -> Fault | None:
        """The fault of this start, counted from 1."""
        for fault in self._faults:
            if fault.fault in START_FAULTS and (fault.times is None or start <= fault.times):
                fault.struck += 1
                return fault
        return None

    def _counted(self, kinds: frozenset[str], path: str, serving: bool) -> Fault | None:
        for fault in self._faults:
            if fault.fault not in kinds or fault.spent or not fault.covers(path, serving):
                continue
            if fault.passed < fault.after:
                fault.passed += 1
                continue
            fault.struck += 1
            return fault
        return None
