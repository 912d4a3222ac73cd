"""curl, as people use it by hand and in scripts."""

from __future__ import annotations

import base64
import json
import subprocess
from typing import Any

from runner import Facts, serve

JSON = ("-H", "Content-Type: application/json", "--data-binary", "@-")


class Failed(Exception):
    """curl ended with another status than 0."""


def _command(
    path: str, *flags: str, url: str, key: str = "none", retries: int = 0, timeout: float = 30
) -> list[str]:
    # With --fail-with-body what a retry replaces would be in the output too.
    fail = ["--fail", "--retry", str(retries)] if retries else ["--fail-with-body"]
    shared = ["--max-time", str(timeout), "-H", f"Authorization: Bearer {key}", f"{url}{path}"]
    return ["curl", "-sS", *fail, *shared, *flags]


def _curl(command: list[str], sent: bytes = b"") -> str:
    done = subprocess.run(command, input=sent, capture_output=True)
    if done.returncode:
        raise Failed(f"{done.returncode}: {done.stderr.decode()} {done.stdout.decode()}")
    return done.stdout.decode()


def _chat(model: str, text: str, **fields: Any) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": text}], **fields}).encode()


def chat(model: str, text: str, stream: bool = False, *, length: int | None = None, **client: Any) -> Facts:
    """Chat completions."""
    fields: dict[str, Any] = {} if length is None else {"max_tokens": length}
    command = _command("/v1/chat/completions", *JSON, **client)
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
        lines = _curl([*command, "-N"], _chat(model, text, **fields)).splitlines()
        frames = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert frames.pop() == "[DONE]"
        chunks = [json.loads(frame) for frame in frames]
    else:
        chunks = [json.loads(_curl(command, _chat(model, text, **fields)))]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    said = (choice["delta" if stream else "message"].get("content") or "" for choice in choices)
    return {
        "text": "".join(said),
        "model": chunks[0]["model"],
        "finish": choices[-1]["finish_reason"],
        "tokens": chunks[-1]["usage"]["completion_tokens"],
    }


def embed(model: str, texts: list[str], **client: Any) -> Facts:
    """Embeddings."""
    sent = json.dumps({"model": model, "input": texts}).encode()
    answer = json.loads(_curl(_command("/v1/embeddings", *JSON, **client), sent))
    return {"vectors": [item["embedding"] for item in answer["data"]]}


def transcribe(model: str, sound: str, **client: Any) -> Facts:
    """Audio to text; the file comes before the model, as people write it."""
    form = ("-F", "file=@-;filename=a.wav", "-F", f"model={model}")
    answer = _curl(_command("/v1/audio/transcriptions", *form, **client), base64.b64decode(sound))
    return {"text": json.loads(answer)["text"]}


def models(**client: Any) -> Facts:
    """The list of models."""
    return {"ids": [model["id"] for model in json.loads(_curl(_command("/v1/models", **client)))["data"]]}


def leave(model: str, text: str, **client: Any) -> Facts:
    """A stream is left after its first piece, as by Ctrl-C."""
    sent = _chat(model, text, stream=True, max_tokens=500)
    command = _command("/v1/chat/completions", "-N", *JSON[:2], "--data-raw", sent.decode(), **client)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    return {}


if __name__ == "__main__":
    serve({one.__name__: one for one in (chat, embed, transcribe, models, leave)})
