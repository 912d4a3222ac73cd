"""Tokens read from the end of a response, as model servers write it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate_edge.usage import UNKNOWN, Tail, Tokens, estimate

PROMPT = 77
USAGE = b'{"prompt_tokens": 12, "completion_tokens":34,"total_tokens":46}'
RESPONSE = (
    b'{"output":[],"usage":{"input_tokens":5,"input_tokens_details":{"cached_tokens":0},'
    b'"output_tokens":6,"output_tokens_details":{"reasoning_tokens":1}},"user":null}'
)
DONE = b"data: [DONE]\n\n"


def text(number: int = 1) -> bytes:
    """Some events of a chat stream."""
    return b'data: {"choices":[{"delta":{"content":"x"}}],"usage":null}\n\n' * number


def read(body: bytes, stream: bool = True, size: int = 10_000_000) -> Tokens:
    """The tokens of a response that came in pieces of a size."""
    tail = Tail()
    for begin in range(0, len(body), size):
        tail.feed(body[begin : begin + size])
    return tail.tokens(stream, PROMPT)


@given(st.integers(0, 400), st.integers(1, 20_000))
def test_the_usage_of_a_stream_is_found_however_it_was_cut_into_pieces(events: int, size: int) -> None:
    """It stands in the last event before the end mark."""
    body = text(events) + b'data: {"choices":[],"usage":%s}\n\n' % USAGE + DONE
    assert read(body, size=size) == Tokens(12, 34)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"choices":[],"usage":%s}' % USAGE, Tokens(12, 34)),
        (b'{"data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}', Tokens(5, 0)),
        (RESPONSE, Tokens(5, 6)),
        (b'{"text":"...","usage":{"type":"duration","seconds":3}}', UNKNOWN),
        (b'{"error":{"message":"no"}}', UNKNOWN),
        (json.dumps({"text": 'they said "usage": {"prompt_tokens": 9}'}).encode(), UNKNOWN),
        (b'{"usage":%s,"text":"%s"}' % (USAGE, b"x" * 9000), UNKNOWN),
        (b"", UNKNOWN),
    ],
)
def test_answers_that_are_no_streams(body: bytes, found: Tokens) -> None:
    """`usage` in the last 8 KiB is believed; without it nothing is known."""
    assert read(body, stream=False) == found
    assert read(body, stream=False, size=7) == found


def test_a_stream_without_usage_is_counted() -> None:
    """Its events, but for the end mark; the prompt by the size of the request. Cut or not."""
    assert read(text(20) + DONE) == Tokens(PROMPT, 20, True)
    assert read(text(20)) == Tokens(PROMPT, 20, True)
    assert read((text(20) + DONE).replace(b"\n", b"\r\n")) == Tokens(PROMPT, 20, True)
    assert read(text(1)) == Tokens(PROMPT, 1, True)
    assert read(b": queued") == UNKNOWN


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("content", ['""', "null"])
def test_events_without_a_token_are_not_counted(choices: int, content: str) -> None:
    """In chat each choice begins with an event that only names the role; keep-alives are comments."""
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":%s}}]}\n\n' % content.encode()
    tail = Tail()
    for chunk in [role] * choices + [b": keep-alive\n\n", text(20), b": keep-alive\n\n", DONE]:
        tail.feed(chunk)
    assert tail.tokens(True, PROMPT) == Tokens(PROMPT, 20, True)
    assert read(role.replace(content.encode(), b'"x"') * 20) == Tokens(PROMPT, 20, True)


def messages(deltas: int, end: bool) -> bytes:
    """A stream of /v1/messages: it tells the prompt's tokens first, the answer's last."""
    start = b'event: message_start\ndata: {"message":{"usage":{"input_tokens":12,"output_tokens":0}}}\n\n'
    delta = b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n'
    last = b'event: message_delta\ndata: {"usage":{"input_tokens":12,"output_tokens":34}}\n\n'
    return start + delta * deltas + (last + b"event: message_stop\ndata: {}\n\n") * end


def test_a_message_that_was_cut_is_counted_on_from_its_first_usage() -> None:
    """Whole, the last usage counts; cut, the deltas after the first one (about) are what was produced."""
    assert read(messages(34, True)) == Tokens(12, 34)
    cut = read(messages(34, False))
    assert (cut.prompt, cut.estimated) == (12, True)
    assert 30 <= cut.completion <= 34
    assert read(messages(1000, False)) == Tokens(PROMPT, 1001, True)


def test_a_usage_without_the_prompt_is_completed() -> None:
    """As Anthropic's own servers end a message: with the answer's tokens alone."""
    body = text(5) + b'event: message_delta\ndata: {"usage":{"output_tokens":34}}\n\nevent: s\ndata: {}\n\n'
    assert read(body) == Tokens(PROMPT, 34, True)


@pytest.mark.parametrize(
    ("path", "limit", "found"),
    [
        (b"/v1/chat/completions", 0, 0),
        (b"/v1/chat/completions", 50, 150),
        (b"/v1/embeddings", 0, 100),
        (b"/v1/rerank", 0, 100),
        (b"/tokenize", 0, 100),
        (b"/v1/audio/transcriptions", 0, 0),
        (b"/v1/own", 0, 0),
    ],
)
def test_what_a_request_may_cost(path: bytes, limit: int, found: int) -> None:
    """Unknown while nobody says how long the answer may be, unless there is none."""
    assert estimate(path, 100, limit) == found
