"""Key files and keyrings, their pure parts: what is refused, with which words, and who a key is."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.edge.keyfiles import key, put, secret
from tidegate_chassis.keyfile import MARK, Key, digest, load, make_secret, parse, render
from tidegate_edge.envelope import Failure
from tidegate_edge.keyring import Keyring

NOW = 2_000_000_000.0
_SECRETS = st.text(string.ascii_letters + string.digits, min_size=1, max_size=40).map(MARK.__add__)
_MOMENTS = st.one_of(st.just(0.0), st.integers(1, 4_000_000_000).map(float))


@st.composite
def _keys(draw: st.DrawFn) -> dict[str, Key]:
    """Keys by their secrets."""
    secrets = draw(st.lists(_SECRETS, max_size=6, unique=True))
    return {
        one: Key(
            id=f"k{i}",
            hash=digest(one.encode()).hex(),
            prefix=one[:9],
            name=draw(st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=100)),
            tenant=draw(st.sampled_from(["default", "a", "team.b-c_d"])),
            models=draw(st.lists(st.sampled_from(["*", "small", "org/Plain-7B", "gpt-small"]), max_size=3)),
            scopes=draw(st.lists(st.sampled_from(["inference", "operator"]), max_size=2)),
            act_as=draw(st.booleans()),
        ).model_copy(update={name: draw(_MOMENTS) for name in ("created", "expires", "revoked")})
        for i, one in enumerate(secrets)
    }


@given(_keys())
def test_what_is_written_is_read_again(keys: dict[str, Key]) -> None:
    """A file says all of its keys, and none of the keys themselves."""
    text = render(keys.values())
    assert parse(text) == (tuple(keys.values()), [])
    assert not [one for one in keys if len(one) > 12 and one.encode() in text]


@given(_keys(), st.text(max_size=50), st.data())
def test_a_key_is_found_by_itself_alone(keys: dict[str, Key], other: str, data: st.DataObject) -> None:
    """Each key is its own caller while it is valid; whatever else is said is nobody."""
    ring = Keyring(keys.values())
    for one, told in keys.items():
        if told.revoked or 0 < told.expires <= NOW:
            with pytest.raises(Failure) as failed:
                ring.find(one.encode(), NOW)
            assert failed.value.status == 401
            continue
        caller = ring.find(one.encode(), NOW)
        assert (caller.key, caller.tenant, caller.act_as) == (told.id, told.tenant, told.act_as)
        assert (caller.inference, caller.operator) == (
            "inference" in told.scopes,
            "operator" in told.scopes,
        )
        assert caller.may_use("small", ("gpt-small",)) == bool({"*", "small", "gpt-small"} & {*told.models})
    wrong = [other, "", *(one[:-1] for one in keys), *(one + "x" for one in keys)]
    wrong += [told.hash for told in keys.values()] + [told.prefix for told in keys.values()]
    for one in (one for one in wrong if one not in keys):
        with pytest.raises(Failure):
            ring.find(one.encode(), NOW)
    assert ring.valid(NOW) == sum(not told.invalid(NOW) for told in keys.values())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


@given(st.one_of(st.binary(max_size=200), _JSON.map(lambda value: json.dumps(value).encode())))
def test_rubbish_is_refused_in_words(text: bytes) -> None:
    """No file makes the reader fail; one that isn't a key file has a problem."""
    keys, problems = parse(text)
    assert not keys
    assert problems


@given(st.sampled_from(sorted(Key.model_fields)), _JSON)
def test_a_field_that_is_wrong_is_named(field: str, value: Any) -> None:
    """Whatever stands in a field is either taken as it is or refused by its path."""
    plain = key("a").plain() | {field: value}
    keys, problems = parse(json.dumps({"version": 1, "keys": [key("b").plain(), plain]}).encode())
    if problems:
        assert all(problem.path.startswith(f"keys.1.{field}") for problem in problems)
    else:
        assert keys[1].plain()[field] == value


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"tenant": "a b"}, "keys.0.tenant", "letters, digits"),
        ({"models": ["small", ""]}, "keys.0.models.1", "or * for all"),
        ({"models": "small"}, "keys.0.models", "give a list"),
        ({"scopes": ["admin"]}, "keys.0.scopes.0", "inference or operator"),
        ({"act_as": "yes"}, "keys.0.act_as", "true or false"),
        ({"expires": "tomorrow"}, "keys.0.expires", "2026-01-31T12:00:00Z"),
        ({"expires": "1970-01-01T00:00:00Z"}, "keys.0.expires", "2026-01-31T12:00:00Z"),
        ({"expires": 1}, "keys.0.expires", "or null"),
        ({"id": ""}, "keys.0.id", "1 to 64"),
        ({"limit": 5}, "keys.0.limit", "no key of this section"),
        ({"hash": "00"}, "keys.0.hash", "64 hexadecimal digits"),
    ],
)
def test_each_problem_has_its_words(change: dict[str, Any], path: str, words: str) -> None:
    """Field, value and what is allowed."""
    text = json.dumps({"version": 1, "keys": [key("a").plain() | change]})
    (problem,) = parse(text.encode())[1]
    assert problem.path == path
    assert words in problem.message


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"version": 2, "keys": []}',
        '{"keys": []}',
        '{"version": 1}',
        '{"version": 1, "keys": {}}',
        '{"version": 1, "keys": ["x"]}',
        '{"version": 1, "keys": [], "version": 1}',
        '{"version": 1, "keys": [{}]}',
        "[" * 100_000,
        "",
    ],
)
def test_a_file_of_another_form_is_refused(text: str) -> None:
    """Among them a field that is given twice, and a version that isn't known."""
    assert parse(text.encode())[1]


@pytest.mark.parametrize("where", ["hash", "prefix", "keys"])
def test_a_key_put_in_by_mistake_is_not_repeated(where: str) -> None:
    """Problems go to logs."""
    plain: Any = secret("mine") if where == "keys" else key("mine").plain() | {where: secret("mine")}
    problems = parse(json.dumps({"version": 1, "keys": [plain]}).encode())[1]
    assert problems
    assert secret("mine") not in str(problems)


def test_equal_keys_and_ids_are_refused() -> None:
    """Two entries can't be told apart."""
    twin = key("a").model_copy(update={"id": "b"})
    assert [problem.path for problem in parse(render([key("a"), twin]))[1]] == ["keys.1.hash"]
    twin = key("b").model_copy(update={"id": "a"})
    assert [problem.path for problem in parse(render([key("a"), twin]))[1]] == ["keys.1.id"]


@pytest.mark.parametrize(
    ("mode", "usable", "said"), [(0o600, True, 0), (0o640, True, 0), (0o644, True, 1), (0o660, False, 1)]
)
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int, usable: bool, said: int) -> None:
    """Who writes it may do everything; who reads it learns names, and is warned about."""
    path = tmp_path / "keys.json"
    put(path, key("a"))
    os.chmod(path, mode)
    found = load(path)
    assert (found.usable, len(found.problems)) == (usable, said)
    assert not load(tmp_path / "none.json").exists
    assert load(tmp_path).problems


def test_new_keys_are_long_and_known_by_their_mark() -> None:
    """More than 200 bits, nothing that a shell or a word selection would break at."""
    made = {make_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(one.startswith("tg-") and len(one) == 43 and one[3:].isalnum() for one in made)
