"""Sections `admission` and `tenants` of the configuration: checked whole, before anything starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tidegate_admission.fairness import DEFAULT_TENANT, TenantRule, Tenants
from tidegate_admission.ticket import Band
from tidegate_chassis import config
from tidegate_chassis.config import Document, Problem, Settings, TelemetrySettings
from tidegate_chassis.kinds import Address, Choice, Duration, Whole
from tidegate_chassis.tls import TlsFiles, check_section

TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


class AdmissionSettings(Settings):
    """Section `admission`: queues, slots and leases."""

    listen: Annotated[str, Address()] = Field(
        "127.0.0.1:7071", description="Where the service listens: `host:port` or `unix:/path`."
    )
    lifecycle_address: Annotated[str, Address(optional=True)] = Field(
        "", description="Where lifecycle is reached; empty = where `lifecycle.listen` says."
    )
    max_concurrent: Annotated[int, Whole(1, 1000)] = Field(
        50, description="Requests in flight per instance, for models that set none of their own."
    )
    max_queue: Annotated[int, Whole(1, 10_000)] = Field(
        200, description="Requests that may wait per model, for models that set none of their own."
    )
    queue_timeout: Annotated[float, Duration("1s", "24h")] = Field(
        300.0,
        description="How long a request may wait for a slot. While the model loads, its start deadline "
        "bounds the wait instead.",
    )
    lease_ttl: Annotated[float, Duration("2s", "300s")] = Field(
        10.0,
        description="After so much silence of an edge its slots are given to others; three heartbeats long.",
    )
    aging: Annotated[float, Duration("1s", "24h")] = Field(
        60.0, description="After so long a waiting request rises by one priority band."
    )
    metrics_listen: Annotated[str, Address(unix=False, optional=True)] = Field(
        "", description="Where `/metrics` is served, `host:port`; empty = nowhere."
    )


class TenantSettings(Settings):
    """One tenant of the section `tenants`."""

    weight: Annotated[int, Whole(1, 1000)] = Field(
        1, description="Share of a model's slots and of its queue, relative to other tenants."
    )
    top_priority: Annotated[str, Choice("high", "normal", "low")] = Field(
        "normal",
        description="The highest priority that its requests may have; what they ask beyond it is lowered.",
    )
    requests_per_minute: Annotated[int, Whole(0, 10_000_000)] = Field(
        0,
        description="Requests per minute over all models and edges, and as many at once; 0 = no limit.",
    )
    tokens_per_minute: Annotated[int, Whole(0, 10_000_000_000)] = Field(
        0,
        description="Tokens per minute over all models and edges, prompts and answers; 0 = no limit. An "
        "estimate is reserved when a request comes, and settled by what it used.",
    )


@dataclass(frozen=True)
class Loaded:
    """The configuration as this service uses it."""

    document: Document
    admission: AdmissionSettings
    telemetry: TelemetrySettings
    tenants: Tenants
    lifecycle_address: str
    """Where lifecycle is reached."""
    tls: TlsFiles | None
    """For gRPC; None = it is plain."""

    def effective(self) -> dict[str, Any]:
        """For the log: the settings in effect, secrets masked."""
        admission = config.effective(self.admission) | {"lifecycle_address": self.lifecycle_address}
        names = sorted({DEFAULT_TENANT, *self.document.section("tenants")})
        tenants = {name: _said(self.tenants.of(name)) for name in names}
        return {"admission": admission, "tenants": tenants, "telemetry": config.effective(self.telemetry)}


def load(path: str | Path) -> Loaded:
    """Reads and checks the file; raises ConfigError with every problem found."""
    loaded, problems = _load(path)
    config.require(problems)
    assert loaded is not None
    return loaded


def problems(path: str | Path) -> list[Problem]:
    """Everything that is wrong or odd with this service's sections; never raises."""
    return sorted(set(_load(path)[1]))


def _load(path: str | Path) -> tuple[Loaded | None, list[Problem]]:
    document = config.read(path)
    problems = list(document.problems)
    admission = config.check(AdmissionSettings, document.section("admission"), "admission", problems)
    telemetry = config.check(TelemetrySettings, document.section("telemetry"), "telemetry", problems)
    tenants = _tenants(document.section("tenants"), problems)
    if admission is None or telemetry is None or tenants is None:
        return None, problems
    if admission.max_concurrent > admission.max_queue:
        words = "is larger than admission.max_queue: a burst is refused although slots would be free soon"
        problems.append(Problem("admission.max_concurrent", words, warning=True))
    files = check_section(document, "admission.listen", admission.listen, problems)
    address = admission.lifecycle_address or _lifecycle_listen(document)
    return Loaded(document, admission, telemetry, tenants, address, files), problems


def _tenants(section: dict[str, Any], problems: list[Problem]) -> Tenants | None:
    rules: dict[str, TenantRule] = {}
    before = len(problems)
    for name, value in section.items():
        if not TENANT.fullmatch(str(name)):
            words = "is no tenant's name; 1 to 64 letters, digits and . _ - are allowed"
            problems.append(Problem(f"tenants.{name}", words))
            continue
        own = config.check(TenantSettings, value or {}, f"tenants.{name}", problems)
        if own is not None:
            rules[str(name)] = TenantRule(
                own.weight,
                int(Band[own.top_priority.upper()]),
                own.requests_per_minute,
                own.tokens_per_minute,
            )
    if len(problems) > before:
        return None
    return Tenants(rules.pop(DEFAULT_TENANT, TenantRule()), rules)


def _said(rule: TenantRule) -> dict[str, Any]:
    return {
        "weight": rule.weight,
        "top_priority": Band(rule.top).name.lower(),
        "requests_per_minute": rule.requests,
        "tokens_per_minute": rule.tokens,
    }


def _lifecycle_listen(document: Document) -> str:
    """Where lifecycle listens by the same file; its own check complains when the value is bad."""
    listen = document.section("lifecycle").get("listen")
    return listen if isinstance(listen, str) and listen else "127.0.0.1:7072"
