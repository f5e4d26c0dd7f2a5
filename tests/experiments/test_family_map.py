"""The map of the family: its rows, its reading, and the command."""

import json

import pytest

from dissect_optax.family import MEMBERS
from experiments.command_line import main
from experiments.studies.family_map import CHANGES, methods_of, reading_of


def row(member, estimate, *, buffers=2, published=False, decided=True):
    return {
        "member": member,
        "buffers": buffers,
        "published": published,
        "difference": {
            "estimate": estimate,
            "low": estimate - 0.1,
            "high": estimate + 0.1,
            "decided": decided,
        },
    }


def test_adam_is_the_reference_and_comes_once():
    names = [method.name for method in methods_of(["lion", "adam"])]
    assert names == ["adam", "family.lion"]
    assert len(methods_of(list(MEMBERS))) == len(MEMBERS)


def test_a_change_is_between_members_of_the_family():
    for axis, _, before, after in CHANGES:
        cells = [MEMBERS[name] for name in (before, after)]
        assert cells[0] != cells[1]
        if axis in ("direction", "order"):
            first, second = (getattr(cell, axis) for cell in cells)
            assert first != second
        if axis == "factor":
            # A sum and an average of gradients differ by a number that tuning finds.
            first, second = (cell.direction.replace("Σ μ^k g", "m") for cell in cells)
            assert first == second


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([row("a", -0.3)], "better than ADAM: a (-0.30 (-0.40 to -0.20))."),
        ([row("a", 0.3)], "no unpublished cell"),
        ([row("a", -0.3, published=True)], "no unpublished cell"),
        ([row("a", -0.05, decided=False)], "no unpublished cell"),
    ],
)
def test_reading_names_cells_that_are_decided_better(rows, sentence):
    (reading,) = reading_of(rows)
    assert sentence in reading
    assert reading.startswith("With 2 buffers")


def test_command_makes_a_table_and_a_figure(tmp_path, capsys):
    members = ("lion", "signum")
    arguments = ["family", "logistic", "--smoke", "--seeds", "2", "--members", *members]
    assert main([*arguments, "--runs-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| lion " in printed
    summary = json.loads((tmp_path / "logistic" / "family_smoke.json").read_text())
    rows = {row["member"]: row for row in summary["rows"]}
    assert list(rows) == ["signum", "lion", "adam"]
    assert rows["lion"]["difference"]["pairs"] == 2
    assert "difference" not in rows["adam"]
    # signum → lion and signum → adam, with equal seeds: one is minus the other's parts.
    changes = {row["after"]: row["difference"] for row in summary["changes"]}
    assert list(changes) == ["lion", "adam"]
    signum, lion = (rows[name]["difference"]["estimate"] for name in members[::-1])
    assert changes["adam"]["estimate"] == pytest.approx(-signum)
    assert changes["lion"]["estimate"] == pytest.approx(lion - signum)
    for name in ("family_logistic_smoke", "family_logistic_axes_smoke"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 1000
