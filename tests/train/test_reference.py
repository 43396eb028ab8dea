"""Promise: the configuration page says what the code does, and every field has its line of documentation."""

from processes import ROOT

from swim.train.reference import reference


def test_the_page_is_current():
    assert (ROOT / "docs" / "config.md").read_text() == reference(), "run 'make docs'"


def test_every_field_is_documented():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert all(line.split("|")[-2].strip() for line in rows)
