"""What code made a file: versions, and the commit of a clean clone."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from swim import __version__


@cache
def versions() -> dict[str, str | None]:
    """Versions of this package and of those that decide about its numbers; `commit` is null unless the code is an
    unchanged clone."""
    packages = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"swim": __version__, **packages, "python": platform.python_version(), "commit": _commit()}


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return None if changes else head
