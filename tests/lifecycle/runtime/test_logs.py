"""What callers are told of a failed start."""

from __future__ import annotations

import pytest

from tidegate_lifecycle import logs


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "(EngineCore pid=77) ERROR 11-21 02:00:00 [core.py:9] OutOfMemoryError: CUDA out of memory",
            "out of device memory",
        ),
        (
            "Free memory on device cuda:0 (3/23 GiB) on startup is less than desired GPU memory utilization",
            "not enough free memory on the device",
        ),
        (
            "ValueError: No available memory for the cache blocks. Try increasing",
            "no memory is left for the KV cache",
        ),
        (
            "AssertionError: Error in memory profiling. Initial free memory 9 GiB",
            "another program's memory use",
        ),
        (
            "huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo",
            "the model's hub refused",
        ),
        (
            "requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url",
            "the model's hub refused access",
        ),
        ("RepositoryNotFoundError: 404 Client Error.", "no such model on the hub"),
        (
            "ModuleNotFoundError: No module named 'flash_attn'",
            "a program's module is missing (ModuleNotFoundError",
        ),
        ("[FATAL tini (7)] exec vllm failed: No such file or directory", "the program was not found in the"),
        ("OSError: [Errno 98] Address already in use", "the port is taken by another program"),
        (
            "Please pass the argument `trust_remote_code=True` to allow custom code",
            "the model brings its own code",
        ),
        ("vllm: error: unrecognized arguments: --no-such", "the server doesn't know one of its arguments"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("error loading model: unable to open file", "the model's file can't be read"),
        ("RuntimeError: No CUDA GPUs are available", "no GPU can be used"),
    ],
)
def test_a_known_cause_is_named(line: str, words: str) -> None:
    """Among other lines, the telling one is found and put in words, with itself behind."""
    noise = [
        "INFO starting",
        line,
        "Traceback (most recent call last):",
        '  File "/opt/x.py", line 3, in main',
    ]
    assert logs.reason(noise).startswith(words)


def test_an_unknown_cause_is_told_by_the_last_error_lines() -> None:
    """Without a known cause the last lines that look like errors are shown, not the traceback around them."""
    lines = [
        "loading",
        "ValueError: the flux is off",
        '  File "/x/y.py", line 1',
        "resource_tracker: leaked",
        "done",
    ]
    assert logs.reason(lines) == "ValueError: the flux is off"
    assert logs.reason(["one", "two", ""]) == "one | two"
    assert logs.reason([]) == ""
    assert logs.reason(["", "   "]) == ""


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        ("error: can't open /home/anna/models/weights.safetensors", "anna"),
        ("error: can't open '~/models/a b.bin'", "models"),
        ("error: FileNotFoundError: ../private/model.gguf", "private"),
        ("error: token hf_AbCdEfGhIjKlMnOp is invalid", "hf_AbCd"),
        ("error: Authorization: Bearer abcdef123456", "abcdef123456"),
        ("error: api_key=sk-1234567890abcdef", "1234567890"),
        ("error in environment DATABASE_URL=postgres://u:p@h/db HOME=/root", "postgres"),
        ("error: no answer of http://10.1.2.3:8000/v1/x", "10.1.2.3"),
        ("error: connect 10.1.2.3:9000 refused", "10.1.2.3"),
        ("error: my value is s3cr3t-value here", "s3cr3t-value"),
        ("\x1b[31merror\x1b[0m: \x07bell\u202e", "\x07"),
    ],
)
def test_nothing_private_reaches_callers(line: str, secret: str) -> None:
    """Paths, addresses, tokens, environment, given secrets and control characters are taken out."""
    told = logs.reason([line], secrets=["s3cr3t-value"])
    assert secret not in told
    assert "error" in told.lower()
    assert told.isprintable()


def test_a_reason_is_short() -> None:
    """However long the lines are, the reason is not."""
    assert len(logs.reason([f"error {i} " + "x" * 5000 for i in range(50)])) <= 300
    assert len(logs.reason(["CUDA out of memory " + "y" * 5000])) <= 300
    assert (
        logs.reason([f"error {i}" for i in range(50)])
        == "error 45 | error 46 | error 47 | error 48 | error 49"
    )
