"""curl, as people use it by hand and in scripts."""

from __future__ import annotations

import base64
import json
import subprocess
from typing import Any

from runner import Facts, serve


class Failed(Exception):
    """curl ended with another status than 0."""


def _command(
    path: str, flags: tuple[str, ...], *, url: str, key: str = "none", retries: int = 0, timeout: float = 30
) -> list[str]:
    # With --fail-with-body what a retry replaces would be in the output too.
    fail = ["--fail", "--retry", str(retries)] if retries else ["--fail-with-body"]
    shared = ["--max-time", str(timeout), "-H", f"Authorization: Bearer {key}", f"{url}{path}"]
    return ["curl", "-sS", *fail, *shared, *flags]


def _curl(path: str, *flags: str, **client: Any) -> str:
    done = subprocess.run(_command(path, flags, **client), capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{done.returncode}: {done.stderr} {done.stdout}")
    return done.stdout


def _json(body: dict[str, Any]) -> tuple[str, ...]:
    return "-H", "Content-Type: application/json", "-d", json.dumps(body)


def _chat(model: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def chat(model: str, text: str, stream: bool = False, *, length: int | None = None, **client: Any) -> Facts:
    """Chat completions."""
    body = _chat(model, text, **({} if length is None else {"max_tokens": length}))
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        lines = _curl("/v1/chat/completions", "-N", *_json(body), **client).splitlines()
        frames = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert frames.pop() == "[DONE]"
        chunks = [json.loads(frame) for frame in frames]
    else:
        chunks = [json.loads(_curl("/v1/chat/completions", *_json(body), **client))]
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
    answer = json.loads(_curl("/v1/embeddings", *_json({"model": model, "input": texts}), **client))
    return {"vectors": [item["embedding"] for item in answer["data"]]}


def transcribe(model: str, sound: str, **client: Any) -> Facts:
    """Audio to text; the file comes before the model, as people write it."""
    command = _command(
        "/v1/audio/transcriptions", ("-F", "file=@-;filename=a.wav", "-F", f"model={model}"), **client
    )
    done = subprocess.run(command, input=base64.b64decode(sound), capture_output=True, check=True)
    return {"text": json.loads(done.stdout)["text"]}


def models(**client: Any) -> Facts:
    """The list of models."""
    return {"ids": [model["id"] for model in json.loads(_curl("/v1/models", **client))["data"]]}


def leave(model: str, text: str, **client: Any) -> Facts:
    """A stream is left after its first piece, as by Ctrl-C."""
    flags = _json(_chat(model, text, stream=True, max_tokens=500))
    command = _command("/v1/chat/completions", ("-N", *flags), **client)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    return {}


if __name__ == "__main__":
    serve({one.__name__: one for one in (chat, embed, transcribe, models, leave)})
