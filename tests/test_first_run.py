"""Promise: a newcomer's path works as it is written, command by command, with the output the page shows."""

from pathlib import Path

import pytest
from documented import ROOT, prepare, run, shape, steps, unsaid

PAGES = ("first_run.md",)


def test_a_changed_line_of_output_is_noticed() -> None:
    printed = "kept 12 of 13 clips in shards/train\n│ pointing │ 0.41 │\n"
    assert not list(unsaid("kept 60 of 61 clips in shards/train\n...\n│ pointing    │ 0.9 │", printed))
    assert list(unsaid("kept 60 of 61 samples in shards/train", printed)) == ["kept of samples in shards/train"]
    assert shape("┏━━━┓\n\n 12 \n") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_every_command_does_what_the_page_says(name: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    for step in steps(ROOT / "docs" / name):
        printed = run(step, tmp_path)
        assert not (missing := list(unsaid(step.output, printed))), f"{step.command}\nlacks {missing}\n{printed}"
