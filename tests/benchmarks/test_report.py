"""Promise: docs/performance.md says what the files in benchmarks/results say, and what has no file is "not run"."""

from benchmarks.report import PAGE, SECTIONS, page, read_results


def test_the_page_is_current():
    assert PAGE.read_text() == page(read_results()), "run `make bench-report`"
    plots = [line.split("(")[-1].rstrip(")") for line in PAGE.read_text().splitlines() if line.startswith("![")]
    assert plots
    assert all((PAGE.parent / plot).exists() for plot in plots)


def test_what_has_no_file_is_not_run():
    text = page({})
    assert text.count("not run") == len(SECTIONS) + sum(name.startswith("gpu") for name in SECTIONS)
