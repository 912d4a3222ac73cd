"""Cases that schemathesis makes of the edge's own description: none fails it, none hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.edge.fakes import echo
from tests.edge.wire.attacked import GROWTH, Attacked
from tests.edge.wire.raw import Reply
from tests.support.depth import SLOW
from tests.support.figures import say

pytestmark = pytest.mark.asyncio(loop_scope="module")

CASES = 10_000 if os.environ.get(SLOW) else 300
LONGEST = 10.0
"""Seconds for an answer; whatever takes longer hangs."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def known(body: Any) -> Any:
    """The same body for a model that there is, where it has a place for one."""
    return body | {"model": "small"} if isinstance(body, dict) else body


def ask(session: requests.Session, url: str, case: schemathesis.Case[Any]) -> int:
    """Sends one case and looks at the answer; its status."""
    response = case.call(base_url=url, session=session, timeout=LONGEST)
    if response.status_code >= 400 and case.method != "HEAD":
        fields = [(name.lower(), value[0]) for name, value in response.headers.items()]
        assert Reply(response.status_code, fields, response.content).error
    # A deadline of the caller's own, of a few milliseconds, may pass: that is no fault of the server.
    late = response.status_code == 504 and response.json()["error"]["code"] == "deadline_exceeded"
    case.validate_response(response, checks=CHECKS[1:] if late else CHECKS)
    return response.status_code


def run(url: str, count: int) -> Counter[str]:
    """About so many cases, as many of each operation, right and wrong ones; their statuses."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    # Orders are carried out by services that are none here.
    operations = [one for one in operations if "orders" not in (one.tags or ())]
    assert operations
    pairs = [
        (operation, mode)
        for operation in operations
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or operation.body or _may_be_wrong(operation)
    ]
    statuses: Counter[str] = Counter()
    with requests.Session() as session:
        session.trust_env = False
        for operation, mode in pairs:
            found = _each(operation.as_strategy(generation_mode=mode), 1 + count // len(pairs), session, url)
            statuses += Counter({f"{mode.value} {status}": times for status, times in found.items()})
    return statuses


def _may_be_wrong(operation: Any) -> bool:
    """A name in a path may be anything, an id may not."""
    return "{id}" in operation.path


def _each(cases: Any, count: int, session: requests.Session, url: str) -> Counter[int]:
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, there=st.booleans())
    def one(case: schemathesis.Case[Any], there: bool) -> None:
        if there:
            case.body = known(case.body)
        statuses[ask(session, url, case)] += 1

    with contextlib.suppress(Unsatisfiable):  # of some there is nothing wrong to be said
        one()
    return statuses


@pytest.mark.timeout(3600 if os.environ.get(SLOW) else 120)
async def test_nothing_that_is_described_fails_the_edge(edge: Attacked) -> None:
    """Right and wrong requests for each route: no 5xx, no hang, every error in the envelope, and each answer
    as it is described."""
    edge.server.script = echo(b'{"id":"x"}')
    before = edge.memory()
    statuses = await asyncio.to_thread(run, f"http://127.0.0.1:{edge.port}", CASES)
    say(
        f"{sum(statuses.values())} cases",
        *(f"{status}: {count}" for status, count in sorted(statuses.items())),
    )
    assert statuses["positive 200"] > CASES // 20
    assert statuses["negative 400"] > CASES // 20
    assert edge.memory() - before <= GROWTH
