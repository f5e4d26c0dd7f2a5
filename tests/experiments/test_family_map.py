"""The map of the family: its rows, its reading, and the command."""

import json

import pytest

from dissect_optax.family import MEMBERS
from experiments.command_line import main
from experiments.studies.family_map import methods_of, reading_of


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
    arguments = ["family", "logistic", "--smoke", "--seeds", "2", "--members", "lion"]
    assert main([*arguments, "--runs-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| lion " in printed
    summary = json.loads((tmp_path / "logistic" / "family_smoke.json").read_text())
    rows = {row["member"]: row for row in summary["rows"]}
    assert list(rows) == ["lion", "adam"]
    assert rows["lion"]["difference"]["pairs"] == 2
    assert "difference" not in rows["adam"]
    assert (tmp_path / "figures" / "family_logistic_smoke.png").stat().st_size > 1000
