"""The configuration reference, made from the fields' docstrings: `make docs` writes it to docs/config.md."""

import importlib
import re
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel

from swim.train.config import Config


def reference() -> str:
    """Markdown page with every field, its type, default and meaning, those of each system at the end."""
    lines = [
        "# Configuration",
        "",
        "Made by `make docs`. Every field can be set on the command line:",
        "`deepspeed launch/train.sh --config tiny_cpu optim.lr=1e-3`.",
        "",
        "| field | type | default | |",
        "| --- | --- | --- | --- |",
    ]
    lines += [row for name, field in Config.model_fields.items() if name != "system" for row in _rows(name, field)]
    for path in sorted((Path(__file__).parent / "systems").glob("*/config.py")):
        section = importlib.import_module(f"swim.train.systems.{path.parent.name}.config").Config
        lines.append(f"| `system.name` | str | required | `{path.parent.name}`: the fields below |")
        lines += [row for name, field in section.model_fields.items() for row in _rows(f"system.{name}", field)]
    return "\n".join(lines) + "\n"


def _rows(name: str, field: Any) -> list[str]:
    options = [field.annotation, *getattr(field.annotation, "__args__", ())]
    section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    many = get_origin(field.annotation) is list
    inner = [
        row
        for key, field_of in (section.model_fields.items() if section else ())
        for row in _rows(f"{name}{'[]' * many}.{key}", field_of)
    ]
    if section is not None and not many:
        return inner
    kind = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    kind = re.sub(r"\w+\.", "", kind).replace("|", "\\|")
    default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
    return [f"| `{name}` | {kind} | {default} | {(field.description or '').replace(chr(10), ' ')} |", *inner]
