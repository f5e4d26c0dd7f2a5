"""The cases of the gradient variance benchmark are right where they are small."""

import pytest

from benchmarks.gradient_variance_cases import CASES, small_errors, table_row


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
