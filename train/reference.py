"""The configuration reference, made from the fields' docstrings: `make docs` writes it to docs/config.md."""

import importlib
from pathlib import Path
from typing import Any

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
    if section is not None:
        return [row for key, inner in section.model_fields.items() for row in _rows(f"{name}.{key}", inner)]
    kind = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    kind = kind.replace("typing.", "").replace("pathlib.", "").replace("|", "\\|")
    default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
    return [f"| `{name}` | {kind} | {default} | {field.description or ''} |"]
