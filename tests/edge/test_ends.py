"""What the last bytes of a stream say about its end."""

from __future__ import annotations

import pytest

from tidegate_edge.ends import complete

CHAT, AUDIO, SPEECH = b"/v1/chat/completions", b"/v1/audio/transcriptions", b"/v1/audio/speech"
RESPONSES, MESSAGES = b"/v1/responses", b"/v1/messages"
TEXT = b'data: {"choices":[{"delta":{"content":"%s"},"finish_reason":null}],"usage":null}\n\n'


@pytest.mark.parametrize(
    ("path", "end", "framed", "whole"),
    [
        (CHAT, b"data: [DONE]\n\n", True, True),
        (CHAT, b"data: [DONE]\n\n", False, True),
        (CHAT, b"data:[DONE]\r\n\r\n", False, True),
        (CHAT, b"data: [DONE]\n\ndata: {", False, False),
        (CHAT, TEXT % b"they said data: [DONE]", True, False),
        (CHAT, TEXT % b'they said \\"finish_reason\\":\\"stop\\"', True, False),
        (CHAT, b'data: {"choices":[{"delta":{},"finish_reason": "stop"}]}\n\n', True, True),
        (CHAT, b'data: {"choices":[{"delta":{},"finish_reason": "stop"}]}\n\n', False, False),
        (CHAT, b'data: {"error": {"message":"no"}}\n\n', True, True),
        (CHAT, b"", True, False),
        (AUDIO, b'data: {"type":"transcript.text.done","text":"x"}\n\n', False, True),
        (AUDIO, b'data: {"type":"transcript.text.delta"}\n\n', True, False),
        (SPEECH, b'data: {"type":"speech.audio.done"}\n\n', False, True),
        (RESPONSES, b'event: response.completed\ndata: {"type":"response.completed"}\n\n', False, True),
        (RESPONSES, b'event: response.failed\ndata: {"type": "response.failed"}\n\n', True, True),
        (RESPONSES, b"x" * 8000 + b'"usage":{"input_tokens":1}}}\n\n', True, True),
        (RESPONSES, b'data: {"type":"response.text.delta","delta":"response.completed"}\n\n', True, False),
        (RESPONSES + b"/{id}", b'data: {"type":"response.output_text.delta"}\n\n', True, False),
        (MESSAGES, b'event: message_stop\ndata: {"type":"message_stop"}\n\n', False, True),
        (MESSAGES, b'event: error\ndata: {"type": "error","error":{}}\n\n', True, True),
        (MESSAGES, b'data: {"type":"content_block_delta","text":"message_stop"}\n\n', True, False),
        (b"/v1/own", b"data: 1\n\n", False, True),
    ],
)  # fmt: skip
def test_a_stream_is_whole_by_the_last_event_of_its_route(
    path: bytes, end: bytes, framed: bool, whole: bool
) -> None:
    """Never by its text, however that reads; of other routes HTTP's end is believed."""
    assert complete(path, end, framed) == whole
