"""What the model says: a function of the prompt and the seed alone, so equal requests get equal answers."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Some words are not ASCII on purpose: a relay that splits or re-encodes characters is found out by them.
WORDS = """
    tide gate water lock harbour stone bridge river slow quick quiet north south east west morning
    evening light dark keel anchor rope sail wind calm storm ebb flow shore reed heron gull Möwe
    salt café naïve señor fjörd 東京 潮 ворота γέφυρα €5 🌊 and or with without under over between after
    before the a one two three keeps opens closes waits turns holds lets draws lifts
""".split()  # noqa: SIM905 - so many words read better as words
GIBBERISH = "!"
# Up to this many bytes of UTF-8 make a token of a prompt.
_TOKEN_BYTES = 4


@dataclass(slots=True)
class Plan:
    """A generation decided in advance: what is said, token by token, and why it ends."""

    prompt_tokens: int
    tokens: list[str]
    finish_reason: str
    """`stop`, `length`, `tool_calls`, or `abort` once the engine has dropped it."""
    tool: str | None = None
    """The tool that is called: the tokens are its arguments. None: they are text."""

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.tokens)


def count_tokens(text: str) -> int:
    """Tokens of a prompt: one for every four bytes of UTF-8, at least one."""
    return max(1, math.ceil(len(text.encode("utf-8", "surrogatepass")) / _TOKEN_BYTES))


def encode(text: str) -> list[int]:
    """Token ids that `decode` turns back: each is up to four bytes behind a leading 1, as one number."""
    data = text.encode("utf-8", "surrogatepass")
    return [
        int.from_bytes(b"\x01" + data[at : at + _TOKEN_BYTES], "big")
        for at in range(0, len(data), _TOKEN_BYTES)
    ]


def decode(ids: Sequence[int]) -> str:
    """The text of token ids; ids that `encode` never made give replacement characters."""
    data = b"".join(number.to_bytes(max(1, (number.bit_length() + 7) // 8), "big")[1:] for number in ids)
    return data.decode("utf-8", "replace")


def render(messages: Sequence[Any]) -> str:
    """The prompt of a chat: roles and texts in order; parts that are not text stand as their type's name."""
    return "\n".join(
        f"{_field(message, 'role')}: {flatten(_field(message, 'content'))}" for message in messages
    )


def flatten(content: Any) -> str:
    """The text of a message's content, which is a string, a list of parts, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_part(part) for part in content)
    return json.dumps(content, ensure_ascii=False)


def _part(part: Any) -> str:
    if isinstance(part, dict):
        said = part.get("text", part.get("content"))
        return flatten(said) if said is not None else f"<{part.get('type', 'part')}>"
    return str(part)


def _field(message: Any, name: str) -> Any:
    return message.get(name) if isinstance(message, dict) else None


def plan(prompt: str, *, seed: Any, length: int, limited: bool, stop: Sequence[str] = ()) -> Plan:
    """Decides an answer of `length` tokens.

    `limited` says that the caller asked for that length, so the end is `length`; else it is `stop`, as it is
    when one of the `stop` strings appears: the text ends before it.
    """
    words = source(prompt, seed).choices(WORDS, k=length)
    tokens = words[:1] + [" " + word for word in words[1:]]
    reason = "length" if limited else "stop"
    if stop:
        tokens, stopped = _cut(tokens, stop)
        reason = "stop" if stopped else reason
    return Plan(count_tokens(prompt), tokens, reason)


def source(prompt: str, seed: Any) -> random.Random:
    """What decides an answer."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode("utf-8", "surrogatepass")).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def _cut(tokens: list[str], stop: Sequence[str]) -> tuple[list[str], bool]:
    said = "".join(tokens)
    found = [at for at in (said.find(word) for word in stop if word) if at >= 0]
    if not found:
        return tokens, False
    left, kept = min(found), []
    for token in tokens:
        if left <= 0:
            break
        kept.append(token[:left])
        left -= len(token)
    return kept, True


def vector(text: str, dimensions: int) -> list[float]:
    """A unit vector of that many dimensions, exactly representable as 32-bit floats."""
    numbers = random.Random(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    raw = [numbers.uniform(-1.0, 1.0) for _ in range(dimensions)]
    norm = math.sqrt(sum(value * value for value in raw)) or 1.0
    # Through float32 and back: the JSON form and the base64 form of a vector are then the same numbers.
    packed = struct.pack(f"<{dimensions}f", *(value / norm for value in raw))
    return list(struct.unpack(f"<{dimensions}f", packed))


def similarity(query: str, document: str) -> float:
    """How much of the query's words the document holds, 0 to 1, with a trace of the text to break ties."""
    asked, given = set(query.lower().split()), set(document.lower().split())
    trace = hashlib.sha256(f"{query}\0{document}".encode("utf-8", "surrogatepass")).digest()[0] / 25600
    return 0.99 * len(asked & given) / max(1, len(asked)) + trace


@lru_cache(maxsize=4096)
def quoted(token: str) -> bytes:
    """A token as a JSON string in UTF-8, as vLLM writes it: not escaped to ASCII."""
    return json.dumps(token, ensure_ascii=False).encode("utf-8", "surrogatepass")
