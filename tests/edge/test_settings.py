"""The section `edge`: what is refused, with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.edge.keyfiles import key, put
from tidegate_chassis.config import ConfigError
from tidegate_edge.envelope import Failure, in_stream, refusal
from tidegate_edge.settings import load, problems


def written(folder: Path, **sections: Any) -> Path:
    path = folder / "tidegate.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_everything_has_a_default(tmp_path: Path) -> None:
    """An empty file is a configuration; peers are where their own sections say."""
    loaded = load(written(tmp_path))
    assert loaded.edge.listen == "127.0.0.1:8080"
    assert (loaded.edge.admission_address, loaded.edge.lifecycle_address) == (
        "127.0.0.1:7071",
        "127.0.0.1:7072",
    )
    loaded = load(written(tmp_path, admission={"listen": "unix:/run/a.sock", "max_queue": "odd"}))
    assert loaded.edge.admission_address == "unix:/run/a.sock"


@pytest.mark.parametrize(
    ("edge", "path", "words"),
    [
        ({"listen": "unix:/tmp/x"}, "edge.listen", "host:port"),
        ({"workers": 65}, "edge.workers", "1 to 64"),
        ({"drain_timeout": "0s"}, "edge.drain_timeout", "1s to 24h"),
        ({"workers": 0}, "edge.workers", "1 to 64"),
        ({"keys_file": ""}, "edge.keys_file", "a path"),
        ({"open_operations": "yes"}, "edge.open_operations", "true or false"),
        ({"cors_origins": "*"}, "edge.cors_origins", "give a list"),
        ({"cors_origins": ["example.org"]}, "edge.cors_origins.0", "https://chat.example.org"),
        ({"cors_origins": ["https://example.org/"]}, "edge.cors_origins.0", "without a path"),
        ({"cors_origins": ["https://Example.org"]}, "edge.cors_origins.0", "lower case"),
        ({"cors_origins": ["null"]}, "edge.cors_origins.0", "* for all"),
        ({"max_body": "2GiB"}, "edge.max_body", "1KiB to 1GiB"),
        ({"max_body": -1}, "edge.max_body", "1KiB to 1GiB"),
        ({"connect_timeout": "99ms"}, "edge.connect_timeout", "100ms to 300s"),
        ({"connect_timeout": "301s"}, "edge.connect_timeout", "100ms to 300s"),
        ({"response_timeout": "59s"}, "edge.response_timeout", "60s to 3600s"),
        ({"response_timeout": "3601s"}, "edge.response_timeout", "60s to 3600s"),
        ({"stream_idle_timeout": "999ms"}, "edge.stream_idle_timeout", "1s to 3600s"),
        ({"stream_idle_timeout": "2h"}, "edge.stream_idle_timeout", "1s to 3600s"),
        ({"write_timeout": "0s"}, "edge.write_timeout", "1s to 3600s"),
        ({"write_timeout": "3601s"}, "edge.write_timeout", "1s to 3600s"),
        ({"retries": {"delay": "9ms"}}, "edge.retries.delay", "10ms to 60s"),
        ({"retries": {"factor": 0.9}}, "edge.retries.factor", "1 to 10"),
        ({"response_timeout": 600}, "edge.response_timeout", "with a unit"),
        ({"retries": {"attempts": 0}}, "edge.retries.attempts", "1 to 10"),
        ({"retries": {"tries": 2}}, "edge.retries.tries", "no key"),
        ({"keepalive_after": "-1s"}, "edge.keepalive_after", "never"),
        ({"extra_routes": ["GET /x"]}, "edge.extra_routes.0", "POST or PUT"),
        ({"extra_routes": ["POST /../x"]}, "edge.extra_routes.0", "plain path"),
        ({"auth": "open"}, "edge.auth", "keys or none"),
        ({"tls": {"cert": "own.pem"}}, "edge.tls.key", "belong together"),
        ({"tls": {"key": "own.key"}}, "edge.tls.cert", "belong together"),
        ({"tls": {"ca": "ca.pem"}}, "edge.tls.ca", "no key"),
        ({"surprise": 1}, "edge.surprise", "no key"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(
    tmp_path: Path, edge: dict[str, Any], path: str, words: str
) -> None:
    """Each problem names its path and the allowed range."""
    found = problems(written(tmp_path, edge=edge))
    assert [problem.path for problem in found] == [path]
    assert words in found[0].message
    with pytest.raises(ConfigError):
        load(written(tmp_path, edge=edge))


@pytest.mark.parametrize(
    ("listen", "auth", "fine"),
    [
        ("127.0.0.1:1", "keys", True),
        ("127.9.9.9:1", "keys", True),
        ("[::1]:1", "keys", True),
        ("localhost:1", "keys", True),
        ("0.0.0.0:1", "keys", False),
        ("[::]:1", "keys", False),
        ("10.0.0.1:1", "keys", False),
        ("example.org:1", "keys", False),
        ("0.0.0.0:1", "none", True),
    ],
)
def test_beyond_loopback_it_must_be_told(tmp_path: Path, listen: str, auth: str, fine: bool) -> None:
    """Without keys the edge opens on loopback only, unless told `auth: none`; the problem says so."""
    found = problems(written(tmp_path, edge={"listen": listen, "auth": auth}))
    assert [problem.path for problem in found] == ([] if fine else ["edge.listen"])
    assert fine or "auth: none" in found[0].message


def test_keys_open_the_edge_to_the_network(tmp_path: Path) -> None:
    """With a key file it may listen anywhere; one that can't be used is refused, with what is wrong."""
    path, config = (
        tmp_path / "keys.json",
        written(tmp_path, edge={"listen": "[::]:1", "keys_file": "keys.json"}),
    )
    put(path, key("a"))
    assert problems(config) == []
    assert [one.id for one in load(config).keys.keys] == ["a"]
    path.chmod(0o666)
    (problem,) = problems(config)
    assert (problem.path, problem.warning) == ("edge.keys_file", False)
    assert "chmod go-w" in problem.message
    path.write_text('{"version": 1, "keys": [{"id": "a"}]}')
    path.chmod(0o600)
    (problem,) = problems(config)
    assert (problem.path, problem.warning) == ("edge.keys_file", False)
    assert "keys.json: keys.0.hash: is required" in problem.message


def test_what_is_odd_about_keys_is_said(tmp_path: Path) -> None:
    """Keys that nobody is asked for, a file that lets nobody in or that everybody may read, a setting without
    effect."""
    path = tmp_path / "tidegate-keys.json"

    def odd(**edge: Any) -> list[str]:
        found = problems(written(tmp_path, edge=edge))
        assert all(problem.warning for problem in found)
        return [problem.path for problem in found]

    assert odd(open_operations=True) == ["edge.open_operations"]
    put(path, key("a").model_copy(update={"revoked": 1.0}))
    assert odd() == ["edge.keys_file"]
    assert odd(auth="none") == ["edge.keys_file"]
    put(path, key("a"))
    assert odd() == []
    path.chmod(0o644)
    assert odd() == ["edge.keys_file"]


def test_operating_routes_are_warned_about(tmp_path: Path) -> None:
    """An extra route that operates model servers is odd, but the operator's to choose."""
    found = problems(written(tmp_path, edge={"extra_routes": ["POST /sleep", "POST /v1/own"]}))
    assert [(problem.path, problem.warning) for problem in found] == [("edge.extra_routes", True)]


def test_what_workers_hold_together_is_shared_out(tmp_path: Path) -> None:
    """Connections and bodies are limits over all workers; a body that no worker can hold is warned about."""
    edge = load(written(tmp_path, edge={"workers": 4, "max_connections": 10, "max_buffered": "1GiB"})).edge
    assert (edge.share(4).max_connections, edge.share(4).max_buffered) == (3, 2**28)
    for body, workers, odd in (("1GiB", 1, False), ("1GiB", 2, True), ("512MiB", 2, False)):
        limits = {"workers": workers, "max_body": body, "max_spooled": "1GiB"}
        found = problems(written(tmp_path, edge=limits))
        assert [(problem.path, problem.warning) for problem in found] == [("edge.max_body", True)] * odd


def test_retry_after_is_what_clients_obey() -> None:
    """429 and 503 always carry whole seconds from 1 to 120; where no retry helps they say so."""
    for seconds in (0.0, 0.01, 7.0, 119.0, 10_000.0):
        for reason in ("QUEUE_FULL", "MODEL_FAILED", "UNAVAILABLE", "NEW_WORD"):
            headers = dict(refusal(reason, "x", seconds).headers())
            assert 1 <= int(headers[b"retry-after"]) <= 120
    told = {dict(refusal("QUEUE_FULL", "x", 40.0).headers())[b"retry-after"] for _ in range(50)}
    own = {dict(Failure("draining", "x", retry_after=40.0).headers())[b"retry-after"] for _ in range(50)}
    assert told == {b"40"}  # admission has spread it over time, once
    assert len(own) > 1
    assert own <= {b"%d" % seconds for seconds in range(40, 49)}
    assert (b"x-should-retry", b"false") in refusal("NO_CAPACITY", "x", 0.0).headers()
    assert (b"x-should-retry", b"false") not in refusal("NO_CAPACITY", "x", 9.0).headers()


def test_messages_are_bounded_and_printable() -> None:
    """No error echoes megabytes or control characters."""
    message = Failure("invalid_json", "a\r\nb\x00" + "x" * 10_000).message
    assert len(message) == 500
    assert message.startswith("a  b x")


def test_every_dialect_ends_its_own_way() -> None:
    """Named events for responses and messages, data and [DONE] elsewhere."""
    error = Failure("upstream_timeout", "slow").error()
    assert in_stream(b"/v1/completions", error).endswith(b"data: [DONE]\n\n")
    assert in_stream(b"/v1/responses", error).startswith(b"event: error\ndata: {")
    assert b'"type":"timeout_error"' in in_stream(b"/v1/messages", error)
