"""The cases of the gradient variance benchmark are right where they are small."""

import json
from pathlib import Path

import pytest

from benchmarks.gradient_variance_cases import (
    CASES,
    RESULTS,
    page_table,
    small_errors,
    table_row,
)

PAGE = Path(__file__).parents[2] / "docs" / "gradient_variance.md"


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.group != "networks"])
def test_small_cases_agree_with_all_per_example_gradients(name: str) -> None:
    errors = small_errors(CASES[name], wide=True)
    assert errors["float64_gradient_error"] < 1e-12
    assert errors["float64_variance_error"] < 1e-12


def test_a_row_marks_what_is_over_its_limit() -> None:
    record = {
        "case": "one",
        "time_limit": 2,
        "copy_limit": 4,
        "time_ratio": 2.5,
        "copies_beyond": 3.0,
        "plain_megabytes": 1.0,
        "ours_megabytes": 4.0,
        "explained_megabytes": 2.0,
    }
    row = table_row(record)
    assert "**2.50 (2)**" in row
    assert "| 3.00 (4) |" in row
    stopped = table_row({"case": "two", "failure": "stopped after 9 s"})
    assert stopped.count("|") == row.count("|")
    assert "stopped after 9 s" in stopped


def test_the_page_shows_before_and_after() -> None:
    before = {"case": "cbow", "time_ratio": 6.01}
    memory = {"plain_megabytes": 15.0, "ours_megabytes": 20.5}
    stopped = {"case": "bigram", "failure": "stopped after 9 s"}
    after = {"case": "cbow", "time_ratio": 12.3, **memory}
    table = page_table(
        {"before": {"records": [before, stopped]}, "after": {"records": [after]}}
    )
    assert "| 6.0 → 12 | not measured → 5.5 |" in table
    assert "| stopped after 9 s → not measured |" in table
    assert len(table.splitlines()) == 4


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    """After a measurement: `python -m benchmarks.gradient_variance_cases --page`."""
    _, _, rest = PAGE.read_text().partition("<!-- hard losses -->\n")
    shown, _, _ = rest.partition("\n<!-- end of hard losses -->")
    assert shown.strip() == page_table(json.loads(RESULTS.read_text()))
