"""What a model server's log says about its failure, fit for callers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_PROFILING = r"Error in memory profiling"
_NO_CACHE = r"No available memory for the cache blocks"
_SMALL_CACHE = (
    r"larger than the (available KV cache memory|maximum number of tokens that can be stored)"
    r"|KV cache is needed, which is larger than"
)
_OUT_OF_MEMORY = (
    r"CUDA out of memory|OutOfMemoryError|cudaMalloc failed: out of memory|HIP out of memory"
    r"|unable to allocate CUDA\d* buffer|failed to allocate .*buffer"
)

# What went wrong, most telling first: the words for callers, and how the log says it. The wording of vLLM,
# torch, huggingface_hub and llama.cpp moves between releases, so these are hints and never required.
_KNOWN: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (words, re.compile(pattern, re.IGNORECASE))
    for words, pattern in (
        ("another program's memory use changed during the start", _PROFILING),
        (
            "not enough free memory on the device",
            r"Free memory on device .* is less than desired GPU memory utilization",
        ),
        (
            "no memory is left for the KV cache: give the model more vram or a smaller max_model_len",
            _NO_CACHE,
        ),
        (
            "the KV cache is too small for max_model_len: more vram or a smaller max_model_len is needed",
            _SMALL_CACHE,
        ),
        (
            "max_model_len is larger than the model's own maximum",
            r"User-specified max_model_len .* is greater than the derived max_model_len",
        ),
        ("out of device memory", _OUT_OF_MEMORY),
        (
            "the model's hub refused access: it is gated or the token is missing or wrong",
            r"gated repo|GatedRepoError|401 Client Error|403 Client Error|Invalid (user token|credentials)",
        ),
        (
            "no such model on the hub",
            (
                r"RepositoryNotFoundError|Repository Not Found|404 Client Error|\bEntryNotFoundError"
                r"|is not a (valid model identifier|local folder)"
            ),
        ),
        (
            "the model's hub can't be reached",
            (
                r"couldn't connect to 'https?|Max retries exceeded with url"
                r"|Temporary failure in name resolution|LocalEntryNotFoundError"
                r"|outgoing traffic has been disabled"
            ),
        ),
        (
            "the model brings its own code; it runs only with --trust-remote-code among extra_args",
            r"trust[_-]remote[_-]code",
        ),
        ("the program was not found in the image", r"exec \S+ failed: No such file"),
        ("the program in the image may not be run", r"exec \S+ failed: Permission denied"),
        ("the port is taken by another program", r"address already in use|EADDRINUSE|couldn't bind.*port"),
        ("the disk is full", r"No space left on device|ENOSPC"),
        ("a program's module is missing", r"ModuleNotFoundError|No module named"),
        (
            "the server doesn't know one of its arguments",
            r"unrecognized arguments|error: invalid argument|error: argument ",
        ),
        (
            "this model's architecture isn't supported by the server",
            r"model architectures? .* (is|are) not supported|unknown model architecture",
        ),
        (
            "no GPU can be used",
            (
                r"No CUDA GPUs are available|CUDA driver version is insufficient|no CUDA-capable device"
                r"|Failed to infer device type|Found no NVIDIA driver|CUDA error: no kernel image"
            ),
        ),
        ("the model's file can't be read", r"failed to load model|error loading model|gguf_init_from_file"),
    )
)

_KINDS = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("neighbour", _PROFILING),
        ("memory", "|".join((_NO_CACHE, _SMALL_CACHE, _OUT_OF_MEMORY))),
    )
)
_LONGEST = 800
_NOISE = re.compile(
    r'^\s*($|File "|Traceback|\^+$|~+|warnings?\.warn|During handling of|The above exception)'
    r"|^\s*\[rank\d+\]:?\s*$|resource_tracker|leaked (semaphore|shared_memory)"
    r"|Engine core initialization failed. See root cause",
    re.IGNORECASE,
)
_ERROR = re.compile(r"error|fatal|fail|exception|refus|denied", re.IGNORECASE)
_PREFIX = re.compile(
    r"^\s*(\x1b\[[0-9;]*m)*(\([A-Za-z_]\w*(?: [\w=]+)* pid=\d+\)\s*)?"
    r"((INFO|WARNING|ERROR|CRITICAL|DEBUG)\s+[\d-]+ [\d:.,]+ (\[[^\]]*\]\s*)?)?(\[rank\d+\]:\s*)?"
)
_CLEAN: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\x1b\[[0-9;?]*[A-Za-z]"), ""),
    (re.compile(r"\b(hf|sk|gh[pousr]|glpat|xox[abp])[_-][A-Za-z0-9_-]{6,}"), "***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), r"\1 ***"),
    (
        re.compile(
            r"(?i)([\w-]{0,40}(?:token|secret|passw\w*|api[_-]?key|credential)[\w-]{0,40}\s*[=:]\s*)\S+"
        ),
        r"\1***",
    ),
    (re.compile(r"\b[A-Z][A-Z0-9_]{2,}=\S+"), "..."),  # NAME=value: an environment
    (re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE), "<address>"),
    (re.compile(r"(?<![\w/.<])(?:~|\.{1,2})?(?:/[^\s/'\":,;()<>\]\[]+){2,}/?"), "<path>"),
    (re.compile(r"(?<![\w/.<])[~/](?:[\w.@+-]+/)*[\w.@+-]+"), "<path>"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"), "<address>"),
    (re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"), " "),
)


def reason(lines: Sequence[str], secrets: Iterable[str] = ()) -> str:
    """Why a server failed, from its last log lines, fit for callers; empty when they tell nothing.

    1. A known cause, in our words, with the line that gave it away.
    2. Else the last lines that look like an error; else the last lines. At most five, 300 characters in all.

    Paths, addresses, environment, tokens, `secrets` and control characters are taken out.
    """
    hidden = sorted({secret for secret in secrets if len(secret) >= 4}, key=len, reverse=True)
    lines = [_bounded(line, hidden) for line in lines]
    for words, pattern in _KNOWN:  # 1
        for line in reversed(lines):
            if pattern.search(line):
                return _shorten(f"{words} ({_shorten(_clean(line), 160)})")
    telling = [line for line in lines if not _NOISE.search(_PREFIX.sub("", line))]  # 2
    errors = [line for line in telling if _ERROR.search(line)]
    cleaned = [_clean(line) for line in (errors or telling)[-5:]]
    text = ""
    for line in reversed(list(dict.fromkeys(line for line in cleaned if line))):
        longer = f"{line} | {text}" if text else line
        if text and len(longer) > 300:
            break
        text = longer
    return _shorten(text)


def kind(lines: Iterable[str]) -> str:
    """What is to follow from a failed start, by its last log lines; empty when they tell nothing of it.

    `neighbour`: another's memory changed while it measured its own, so it is worth another try at once.
    `memory`: what was reserved for it isn't enough.
    """
    lines = [line[:_LONGEST] for line in lines]
    found = (kind for kind, pattern in _KINDS if any(map(pattern.search, lines)))
    return next(found, "")


def _bounded(line: str, hidden: Sequence[str]) -> str:
    """A line without the secrets, and short: what is searched with patterns must not be endless.

    Secrets first: half of one wouldn't be recognized.
    """
    for secret in hidden:
        line = line.replace(secret, "***")
    return line[:_LONGEST]


def _clean(line: str) -> str:
    line = _PREFIX.sub("", line)
    for pattern, replacement in _CLEAN:
        line = pattern.sub(replacement, line)
    return " ".join(line.split())


def _shorten(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."
