"""Shards that several test files read."""

from pathlib import Path

import pytest

from swim.data_tools.synth import synthesise


@pytest.fixture(scope="session")
def synth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips with many hidden objects; tests that damage shards copy it first."""
    folder = tmp_path_factory.mktemp("synth")
    synthesise(folder, clips=6, seed=5, hidden=0.5)
    return folder
