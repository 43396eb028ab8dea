"""Where the real clips for tests lie; they are not part of the repository."""

import os
from pathlib import Path

import pytest


def footage_dir() -> Path:
    """Folder SWIM_FOOTAGE, or ../shared/footage beside the repository; skips the test where it is absent."""
    folder = Path(os.environ.get("SWIM_FOOTAGE", Path(__file__).parents[2] / "shared" / "footage"))
    if not folder.is_dir():
        pytest.skip(f"no footage folder at {folder}; set SWIM_FOOTAGE")
    return folder
