"""Rates at the edge: the fields that clients read, the error, and what it tells admission for settling."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.edge.conftest import CHAT, Make
from tests.edge.fakes import QUEUE, Answer, Connection, ask, echo
from tests.support.until import until
from tidegate.admission.v1 import admission_pb2 as ad
from tidegate_edge.envelope import in_stream, refusal
from tidegate_edge.head import rate_fields
from tidegate_edge.ticket import Allowance

RATES = ad.RateState(
    requests=ad.Allowance(limit=60, remaining=59, reset_ms=1000),
    tokens=ad.Allowance(limit=150_000, remaining=0, reset_ms=360_000),
)
OPENAI = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-remaining-requests": "59",
    "x-ratelimit-reset-requests": "1s",
    "x-ratelimit-limit-tokens": "150000",
    "x-ratelimit-remaining-tokens": "0",
    "x-ratelimit-reset-tokens": "6m0s",
}


def limits(answer: Answer) -> dict[str, str]:
    """The fields about rates; each must be there once."""
    found = [(name, value) for name, value in answer.fields if name.startswith("x-ratelimit-")]
    assert len(found) == len(dict(found))
    return dict(found)


async def with_limits(connection: Connection) -> None:
    """A model server that tells rates of its own."""
    while await connection.request():
        await connection.say(
            b"HTTP/1.1 200 OK\r\nX-RateLimit-Limit-Requests: 7\r\nx-ratelimit-reset-images: 8s\r\n"
            b"content-length: 2\r\n\r\n{}"
        )


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [
        (0, b"0s"),
        (1, b"1ms"),
        (120, b"120ms"),
        (1000, b"1s"),
        (1500, b"1.5s"),
        (59_999, b"59.999s"),
        (60_000, b"1m0s"),
        (91_250, b"1m31.25s"),
        (360_000, b"6m0s"),
        (3_600_000, b"1h0m0s"),
        (7_384_005, b"2h3m4.005s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(milliseconds: int, words: bytes) -> None:
    """SDKs and their users parse them."""
    fields = dict(rate_fields({"tokens": Allowance(5, 4, milliseconds)}))
    assert fields[b"x-ratelimit-reset-tokens"] == words
    assert len(fields) == 3


async def test_answers_tell_the_rates_and_the_servers_own_only_where_there_are_none(bench: Make) -> None:
    """Ours replace all of the model server's: nobody could tell which limit a field is about."""
    one = await bench(with_limits)
    assert limits(await one.chat()) == {"x-ratelimit-limit-requests": "7", "x-ratelimit-reset-images": "8s"}
    one.admission.rates = RATES
    assert limits(await one.chat()) == OPENAI
    one.admission.rates = ad.RateState(requests=RATES.requests)
    assert limits(await one.chat()) == {name: OPENAI[name] for name in OPENAI if name.endswith("requests")}


@pytest.mark.parametrize(("remaining", "kind"), [(0, "requests"), (3, "tokens")])
async def test_a_rate_that_is_used_up_is_openais_error(bench: Make, remaining: int, kind: str) -> None:
    """429, the limit's name as its type, when to come again, and what is left."""
    one = await bench(echo())
    rates = ad.RateState(requests=ad.Allowance(limit=9, remaining=remaining, reset_ms=5), tokens=RATES.tokens)
    one.admission.refusal = ad.Refusal(
        reason=ad.REASON_RATE_LIMITED, retry_after_ms=3000, message="too much", queue=QUEUE, rates=rates
    )
    answer = await one.chat()
    assert answer.status == 429
    assert answer.error == {"message": "too much", "type": kind, "param": None, "code": "rate_limit_exceeded"}
    assert 3 <= int(answer.header("retry-after") or 0) <= 4
    assert limits(answer)["x-ratelimit-remaining-requests"] == str(remaining)
    assert limits(answer)["x-ratelimit-limit-tokens"] == "150000"
    assert answer.header("x-queue-depth") == "1"
    assert not one.server.seen


def test_inside_a_stream_it_is_the_routes_own_error() -> None:
    """Anthropic's word for both rates is rate_limit_error."""
    for rates in ({"requests": Allowance(1, 0, 5)}, {"tokens": Allowance(1, 0, 5)}):
        error = refusal("RATE_LIMITED", "too much", 3.0, rates).error()
        assert b'"type":"rate_limit_error"' in in_stream(b"/v1/messages", error)
        assert next(iter(rates)).encode() in in_stream(CHAT.encode(), error)


async def _ended(one: Any) -> ad.Done:
    await one.admission.outcome()
    done: ad.Done = one.admission.done[1]
    return done


@pytest.mark.parametrize(
    ("path", "body", "estimate"),
    [
        (CHAT, b'{"model":"small","max_tokens":50,"x":1}', 9 + 50),
        (CHAT, b'{"model":"small"}', 0),
        ("/v1/embeddings", b'{"model":"small","input":"....."}', 8),
    ],
)
async def test_the_estimate(bench: Make, path: str, body: bytes, estimate: int) -> None:
    """A quarter of the body's bytes and the caller's maximum; 0 when the answer may be of any length."""
    one = await bench(echo())
    await ask(one.edge.port, "POST", path, body)
    assert one.admission.acquired[0].token_estimate == estimate


async def test_an_error_of_the_model_server_costs_no_tokens(bench: Make) -> None:
    """It says that there were none; an answer that doesn't tell any says nothing."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.answer(b'{"error":{"message":"no"}}', "400 Bad Request")
        await connection.request()
        await connection.answer(b"{}")

    one = await bench(script)
    assert (await one.chat()).status == 400
    done = await _ended(one)
    assert (done.outcome, done.without_tokens) == (ad.OUTCOME_OK, True)
    assert (await one.chat()).status == 200
    await one.admission.outcome(2)
    assert not one.admission.done[2].without_tokens


async def test_a_stream_whose_client_leaves_is_settled_by_what_was_produced(bench: Make) -> None:
    """The events until then, and the prompt by the size of the body; marked as an estimate."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.begin_events()
        for _ in range(9):
            await connection.chunk(b'data: {"choices":[]}\n\n')
        await connection.gone()

    one = await bench(script)
    client = await one.client()
    body = b'{"model":"small","stream":true,"messages":["%s"]}' % (b"x" * 400)
    await client.send("POST", CHAT, body)
    await client.head()
    heard = b""
    while heard.count(b"data") < 9:
        heard += await client.piece()
    client.leave()
    done = await _ended(one)
    assert done.outcome == ad.OUTCOME_CLIENT_GONE
    assert (done.prompt_tokens, done.completion_tokens, done.tokens_estimated) == (len(body) // 4, 9, True)
    line = (await one.edge.access())[0]
    assert (line["prompt_tokens"], line["completion_tokens"], line["estimated"]) == (len(body) // 4, 9, True)


async def test_a_grant_that_crosses_the_clients_leaving_is_unused(bench: Make) -> None:
    """Nothing was sent to the model server, so nothing is to be paid, whichever admission saw first."""
    one = await bench(echo())
    one.admission.holding = True
    client = await one.client()
    await client.send("POST", CHAT, b'{"model":"small"}')
    await until(lambda: one.admission.acquired, "a ticket")
    client.leave()
    await asyncio.wait_for(_ended(one), 5)
    assert one.admission.done[1].outcome == ad.OUTCOME_UNUSED
