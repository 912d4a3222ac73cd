"""The configuration file: its forms, its kinds of values, and how problems are said."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from tidegate_chassis.config import (
    ConfigError,
    Problem,
    Settings,
    check,
    effective,
    later,
    read,
    require,
)
from tidegate_chassis.kinds import Address, Choice, Duration, Flag, Kind, Number, Size, Text, Whole


class Inner(Settings):
    """A nested section."""

    attempts: Annotated[int, Whole(1, 10)] = Field(3, description="How often.")


class Section(Settings):
    """A section."""

    workers: Annotated[int, Whole(1, 64)] = Field(1, description="How many.")
    timeout: Annotated[float, Duration("60s", "3600s")] = Field(600.0, description="How long.")
    api_token: Annotated[str, Text(".*", "a text")] = Field("", description="A secret.")
    inner: Inner = Field(Inner(), description="Nested.")
    colour: Annotated[str, Choice("red", "blue")] = later("red", "colours come later", "Which colour.")


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tidegate.yaml"
    path.write_text(text)
    return path


def test_values_come_from_file_and_environment(tmp_path: Path) -> None:
    """`${NAME}` is filled in with its type, and TIDEGATE_SECTION__KEY replaces a value, nested ones too."""
    path = _file(tmp_path, "edge: {workers: '${N}', api_token: 'x-${T}'}\nadmission:\n")
    environ = {"N": "7", "T": "s", "TIDEGATE_EDGE__TIMEOUT": "90s", "TIDEGATE_EDGE__INNER__ATTEMPTS": "5"}
    document = read(path, environ)
    problems: list[Problem] = []
    settings = check(Section, document.section("edge"), "edge", problems)
    assert not problems
    assert not document.problems
    assert settings == Section(workers=7, api_token="x-s", timeout="90s", inner={"attempts": 5})
    assert document.section("admission") == {}


def test_an_unset_name_and_an_unknown_section_are_problems(tmp_path: Path) -> None:
    """What isn't set in the environment and what is no section are told with their paths."""
    document = read(_file(tmp_path, "edge: {api_token: '${NOPE}'}\nedgy: {}\nmodels: 5\n"), {})
    assert {problem.path for problem in document.problems} == {"edge.api_token", "edgy", "models"}


@pytest.mark.parametrize(
    ("given_value", "path", "words"),
    [
        ({"workers": 0}, "edge.workers", "0 is not allowed; give a whole number from 1 to 64"),
        ({"workers": True}, "edge.workers", "from 1 to 64"),
        ({"timeout": "5s"}, "edge.timeout", "from 60s to 3600s"),
        ({"timeout": 600}, "edge.timeout", "a duration with a unit"),
        ({"inner": {"attempts": 11}}, "edge.inner.attempts", "from 1 to 10"),
        ({"inner": 3}, "edge.inner", "give keys and values"),
        ({"worker": 1}, "edge.worker", "did you mean workers?"),
        ({"colour": "blue"}, "edge.colour", "has no function in this version: colours come later"),
    ],
)
def test_problems_name_path_value_and_range(given_value: dict[str, Any], path: str, words: str) -> None:
    """A wrong value is told with its path and with what is allowed."""
    problems: list[Problem] = []
    assert check(Section, given_value, "edge", problems) is None
    (problem,) = problems
    assert problem.path == path
    assert words in problem.message


def test_the_default_of_a_later_key_may_be_written() -> None:
    """A key without function is only refused when it asks for something."""
    problems: list[Problem] = []
    assert check(Section, {"colour": "red"}, "edge", problems) is not None


def test_warnings_refuse_nothing() -> None:
    """Warnings alone pass, and are shown as such; one problem refuses with everything."""
    warning = Problem("a", "odd", warning=True)
    require([warning])
    assert str(warning) == "warning: a: odd"
    with pytest.raises(ConfigError) as caught:
        require([warning, Problem("b", "wrong"), Problem("b", "wrong")])
    assert len(caught.value.problems) == 2


def test_secrets_are_masked_in_the_effective_settings() -> None:
    """What looks like a secret doesn't get into the log."""
    shown = effective(Section(api_token="hf_abc"))
    assert shown["api_token"] == "***"
    assert shown["workers"] == 1


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Whole(1, 5, zero="never"), [0, 1, 5], [6, -1, "1", 1.0, None]),
        (Number(0, 1), [0, 1, 0.5], [1.1, "1", False]),
        (
            Duration("1s", "1h", zero="never"),
            ["1s", "60m", "0s", 0, "1500ms"],
            ["2h", "1", 5, "s", "-1s", False],
        ),
        (Size("1KiB", "1GiB"), ["1KiB", "1GiB", "1.5MiB"], ["1", "2GiB", "1kib", 1024, None]),
        (Flag(), [True, False], ["yes", 1, None]),
        (
            Address(),
            ["127.0.0.1:80", "[::1]:0", "unix:/run/x.sock"],
            ["80", ":80", "h:99999", "unix:" + "/x" * 60],
        ),
        (Address(unix=False, optional=True), ["", None, "h:1"], ["unix:/x"]),
        (Choice("a", "b"), ["a"], ["c", None, 1]),
    ],
)
def test_kinds_take_what_they_say(kind: Kind, good: list[object], bad: list[object]) -> None:
    """Each kind parses what it allows and refuses the rest, at the edges too."""
    for value in good:
        kind.parse(value)
    for value in bad:
        with pytest.raises(ValueError):  # noqa: PT011 - the kind's words come from `allowed`
            kind.parse(value)
    assert kind.allowed()


@given(st.integers(0, 10**7))
def test_a_shown_duration_is_read_as_itself(milliseconds: int) -> None:
    """What the reference prints can be written into the file."""
    kind = Duration("0s", "365d", zero="never")
    assert kind.parse(kind.show(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)
