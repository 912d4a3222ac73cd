"""The configuration file: read whole, checked whole, before anything starts.

Every service reads the same file and checks its own sections. All problems are reported at once, each
with its path and with what is allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tidegate_chassis.kinds import Choice, Kind, Number, Text

EXIT_CONFIG = 78
"""Exit status of every command that refuses its configuration (EX_CONFIG of sysexits.h)."""

SECTIONS = ("edge", "admission", "tenants", "lifecycle", "defaults", "models", "tls", "telemetry")
_OVERRIDABLE = ("edge", "admission", "lifecycle", "tls", "telemetry")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong (or odd) with the configuration."""

    path: str
    """Where, in dots: `models.chat.vram`."""
    message: str
    """What, and what is allowed."""
    warning: bool = False
    """Odd, but legal: said, and nothing is refused because of it."""

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        return f"warning: {text}" if self.warning else text


class ConfigError(Exception):
    """Raised when the configuration can't be used; carries every problem found."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class Settings(BaseModel):
    """Base of all sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(Kind,))


def later(default: Any, word: str, description: str) -> Any:
    """A key that is known but has no function yet: any value but the default is refused with `word`."""
    return Field(default, description=description, json_schema_extra={"later": word})


class TelemetrySettings(Settings):
    """Section `telemetry`: logs and traces, the same for all services."""

    otlp_endpoint: Annotated[
        str, Text(r"|https?://\S+", "a URL such as http://127.0.0.1:4317, or nothing")
    ] = Field("", description="Where traces are sent by OTLP over gRPC; empty = tracing is off.")
    sample: Annotated[float, Number(0, 1)] = Field(
        0.01, description="Share of requests that are traced, unless the caller's `traceparent` decides."
    )
    log_format: Annotated[str, Choice("console", "json")] = Field(
        "console", description="How log lines look."
    )
    log_level: Annotated[str, Choice("debug", "info", "warning", "error")] = Field(
        "info", description="The least important lines that are written."
    )


@dataclass
class Document:
    """A configuration file after reading: sections as plain data, and what was wrong with its form."""

    path: Path
    sections: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    blank: bool = False
    """The file holds nothing."""

    def section(self, name: str) -> dict[str, Any]:
        """A section's keys; an empty one when it is left out."""
        value = self.sections.get(name)
        return value if isinstance(value, dict) else {}

    def resolve(self, path: str) -> Path:
        """A path of the configuration: `~` expanded, relative to the file's folder."""
        return (self.path.resolve().parent / Path(path).expanduser()).absolute()


def read(path: str | Path, environ: Mapping[str, str] = os.environ) -> Document:
    """Reads a file, puts in `${NAME}` and the overrides of the environment; never raises for its content."""
    document = Document(Path(path))
    try:
        text = document.path.read_text(encoding="utf-8")
        data = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader, see below
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        document.problems.append(Problem("", f"{path} can't be read: {reason}"))
        return document
    if not isinstance(data, dict | None):
        document.problems.append(Problem("", f"{path} must hold sections ({', '.join(SECTIONS)})"))
        return document
    document.blank = not data
    for name, value in (data or {}).items():
        if name not in SECTIONS:
            document.problems.append(Problem(str(name), f"is no section; there are {', '.join(SECTIONS)}"))
        elif value is not None and not isinstance(value, dict):
            document.problems.append(Problem(name, "must hold keys and values"))
        else:
            document.sections[name] = _interpolate(value or {}, name, environ, document.problems)
    _override(document, environ)
    return document


_S = TypeVar("_S", bound=Settings)


def check(cls: type[_S], value: Any, path: str, problems: list[Problem]) -> _S | None:
    """A section's settings, or None; what is wrong is added to `problems`."""
    try:
        settings = cls.model_validate(value)
    except ValidationError as error:
        problems.extend(_problem(cls, path, item) for item in error.errors())
        return None
    before = len(problems)
    _refuse_later(settings, path, problems)
    return settings if len(problems) == before else None


def require(problems: list[Problem]) -> None:
    """Raises ConfigError with all problems, sorted, each once, if one of them is more than a warning."""
    if any(not problem.warning for problem in problems):
        raise ConfigError(sorted(set(problems)))


def effective(settings: BaseModel) -> dict[str, Any]:
    """The settings as they are in effect, for the log; what looks like a secret is masked."""

    def masked(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: masked(str(name), item) for name, item in value.items()}
        return "***" if value and re.search(r"(?i)token|secret|password|api_?key", key) else value

    return {key: masked(key, value) for key, value in settings.model_dump().items()}


def _problem(cls: type[Settings], path: str, item: Any) -> Problem:
    where = ".".join([path, *(str(part) for part in item["loc"])])
    given = repr(item.get("input"))[:60]
    words = {
        "extra_forbidden": "is no key of this section" + _nearest(cls, item["loc"]),
        "missing": "is required",
        "model_type": f"{given} is not allowed; give keys and values",
        "dict_type": f"{given} is not allowed; give keys and values",
        "list_type": f"{given} is not allowed; give a list",
        "string_type": f"{given} is not allowed; give a text",
    }
    return Problem(where, words.get(item["type"], item["msg"].removeprefix("Value error, ")))


def _nearest(cls: type[Settings], loc: tuple[Any, ...]) -> str:
    import difflib

    close = difflib.get_close_matches(str(loc[-1]), list(cls.model_fields), n=1) if len(loc) == 1 else []
    return f"; did you mean {close[0]}?" if close else ""


def _refuse_later(settings: BaseModel, path: str, problems: list[Problem]) -> None:
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        extra = info.json_schema_extra
        if (
            isinstance(extra, dict)
            and "later" in extra
            and value != info.get_default(call_default_factory=True)
        ):
            problems.append(Problem(f"{path}.{name}", f"has no function in this version: {extra['later']}"))
        elif isinstance(value, BaseModel):
            _refuse_later(value, f"{path}.{name}", problems)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value!r} is given twice")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _interpolate(value: Any, path: str, environ: Mapping[str, str], problems: list[Problem]) -> Any:
    if isinstance(value, dict):
        return {key: _interpolate(item, f"{path}.{key}", environ, problems) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, f"{path}.{i}", environ, problems) for i, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    unset = (name for name in _VARIABLE.findall(value) if name not in environ)
    problems.extend(Problem(path, f"${{{name}}} is not set in the environment") for name in unset)
    filled = _VARIABLE.sub(lambda found: environ.get(found[1], ""), value)
    whole = _VARIABLE.fullmatch(value)
    return yaml.safe_load(filled) if whole and filled else filled


def _override(document: Document, environ: Mapping[str, str]) -> None:
    """TIDEGATE_<SECTION>__<KEY>[__<KEY>] replaces one value; an unknown key is then found like any other."""
    for name, text in sorted(environ.items()):
        section, *keys = name.removeprefix("TIDEGATE_").lower().split("__")
        if not name.startswith("TIDEGATE_") or section not in _OVERRIDABLE or not all(keys) or not keys:
            continue
        target = document.sections.setdefault(section, {})
        for key in keys[:-1]:
            target = target.setdefault(key, {}) if isinstance(target, dict) else {}
        if isinstance(target, dict):
            target[keys[-1]] = yaml.safe_load(text) if text else ""
