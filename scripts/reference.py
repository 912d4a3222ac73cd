"""Writes docs/configuration.md from the settings' own documentation.

`--check` writes nothing and fails when the committed page is not what the settings say.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tidegate_admission.settings import AdmissionSettings, TenantSettings
from tidegate_chassis.config import TelemetrySettings
from tidegate_chassis.kinds import Kind
from tidegate_chassis.tls import TlsSettings
from tidegate_edge.settings import EdgeSettings
from tidegate_lifecycle.model_settings import ModelSettings
from tidegate_lifecycle.settings import LifecycleSettings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """# Configuration reference

<!-- made by `make docs` from the settings' own documentation; don't edit -->

One YAML file for all services; each reads its own sections, and `tidegate config check FILE` asks all three.

- Durations carry a unit: `250ms`, `10s`, `30m`, `2h`; sizes too: `32MiB`, `24GiB`. `0` means "never" or
  "none" only where it says so.
- `${NAME}` in any value is taken from the environment; a name that isn't set is an error.
- `TIDEGATE_<SECTION>__<KEY>` in the environment replaces a value of the sections edge, admission,
  lifecycle, tls and telemetry: `TIDEGATE_EDGE__LISTEN=127.0.0.1:9000`.
- Relative paths, and the working directory of model servers, are relative to the file's folder.
- Unknown keys are errors. A key marked *later* is known, but has no function in this version: any value
  but its default is refused.
"""

SECTIONS: list[tuple[str, type[BaseModel], str]] = [
    ("edge", EdgeSettings, "The OpenAI-compatible HTTP server."),
    ("admission", AdmissionSettings, "Queues and leases."),
    ("tenants.NAME", TenantSettings, "Who shares a model's slots, by name; `default` is everybody else."),
    ("lifecycle", LifecycleSettings, "Model servers and the devices they run on."),
    (
        "models.NAME",
        ModelSettings,
        "The models. `defaults` takes the same keys; a model's own value wins.",
    ),
    ("tls", TlsSettings, "TLS between the services: gRPC on every `host:port`. Unix sockets stay plain."),
    ("telemetry", TelemetrySettings, "Logs and traces of all services."),
]


def rows(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The table's rows for a section, nested sections included."""
    for name, field in section.model_fields.items():
        nested = _nested(field)
        if nested is not None and _kind(field) is None:
            yield from rows(nested, f"{prefix}{name}.")
            continue
        kind = _kind(field)
        extra = field.json_schema_extra
        later = f" *Later: {extra['later']}.*" if isinstance(extra, dict) and "later" in extra else ""
        allowed = kind.allowed() if kind else "a list" if "list" in str(field.annotation) else "a text"
        yield f"| `{prefix}{name}` | {_default(field, kind)} | {allowed} | {field.description}{later} |"


def _kind(field: FieldInfo) -> Kind | None:
    return next((item for item in field.metadata if isinstance(item, Kind)), None)


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, alone or as the items of a list."""
    pending: list[Any] = [field.annotation]
    while pending:
        kind = pending.pop()
        if inspect.isclass(kind) and get_origin(kind) is None and issubclass(kind, BaseModel):
            return kind
        pending.extend(get_args(kind))
    return None


def _default(field: FieldInfo, kind: Kind | None) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required() or value is PydanticUndefined:
        return "required"
    if value in ("", None, (), [], {}):
        return ""
    return f"`{kind.show(value) if kind else value}`"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, section, about in SECTIONS:
        table = "\n".join(rows(section))
        parts.append(
            f"## `{name}`\n\n{about}\n\n| key | default | allowed | meaning |\n|---|---|---|---|\n{table}\n"
        )
    return "\n".join(parts)


def main() -> int:
    """Writes or checks the page."""
    text = page()
    if "--check" in sys.argv:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print("docs/configuration.md is not what the settings say: run `make docs`")
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
