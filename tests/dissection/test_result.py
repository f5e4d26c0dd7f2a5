import builtins
import dataclasses
import importlib
import io
import json
import math
import re
from typing import Any

import pytest
from rich.console import Console

from dissect_optax.dissection._result import Dissection, Tuning
from dissect_optax.dissection._rows import Rows, Run
from dissect_optax.dissection._warnings import (
    CorrelatedExamples,
    DissectionWarning,
    Diverged,
    EstimatorsDisagree,
    LossClipped,
    MeasurementWarning,
    NoLargestStepSize,
    NothingStable,
    SameInitialLoss,
    StepSizeAtGridEdge,
    TooFewSeeds,
    TooFewTuningSeeds,
    warning_from_dict,
)
from tests.dissection.examples import (
    FALLS,
    interval,
    make_example,
    make_measurement,
    make_run,
    make_runs,
    make_setup,
    make_tuning,
    make_tuning_runs,
)


def kinds(result: Dissection) -> set[type[DissectionWarning]]:
    return {type(warning) for warning in result.warnings}


# ---- Rows -------------------------------------------------------------------------


def test_a_run_without_one_value_per_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match="one value per evaluation; got 2 steps"):
        Run("adam", 8, 1, 0.1, "replicate", (0, 1), (1.0,), {}, False, 0.0)
    with pytest.raises(ValueError, match="at least one evaluation"):
        Run("adam", 8, 1, 0.1, "replicate", (), (), {}, False, 0.0)


def test_rows_become_tables_of_pandas() -> None:
    pytest.importorskip("pandas")
    result = make_example()
    runs = result.runs.to_pandas()
    assert len(runs) == sum(len(run.steps) for run in result.runs)
    assert {"method", "seed", "step", "training_loss", "test_accuracy"} <= set(runs)
    tunings = result.tunings.to_pandas()
    assert len(tunings) == sum(len(row.candidates) for row in result.tunings)
    assert tunings[tunings.picked].learning_rate.unique().tolist() == [0.1]
    measurements = result.measurements.to_pandas()
    assert "improvement.sign.low" in measurements
    assert measurements["layers.w.noise_scale.value"].tolist() == [12.0] * 6


def test_pandas_that_is_missing_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ImportError, match="needs pandas, which is not installed"):
        Rows(make_runs()).to_pandas()


# ---- Effects and forecast ---------------------------------------------------------


def test_effects_by_batch_size_and_name() -> None:
    result = make_example()
    assert list(result.effects) == [8, 128]
    # Losses fall along a line, so the mean is half of the fall.
    assert result.effects[8]["sign"].estimate == pytest.approx(-0.5, abs=0.03)
    assert result.effects[8]["interaction"].estimate == pytest.approx(-0.2, abs=0.05)
    final = result.secondary["log_final_loss"][8].effects["sign"]
    assert final.estimate == pytest.approx(-1.0 * 0.95, abs=0.06)
    accuracy = result.secondary["test_accuracy"][8].effects["sign"]
    assert accuracy.estimate > 0
    assert accuracy.smallest == 0.0
    assert {entry.column for entry in result.crossovers} == {"sign", "adam − m_sgd"}


def test_an_effect_that_is_missing_is_explained() -> None:
    result = Dissection(make_setup(), make_runs({"adam": 3.4}))
    with pytest.raises(KeyError, match="need replicates of all four methods"):
        result.effects[8]["sign"]


def make_race(**setup: Any) -> Dissection:
    """A race alone, in which the larger step size is better."""
    runs = []
    for rate in (0.06, 0.1):
        falls = {name: 2 * fall * rate for name, fall in FALLS.items()}
        runs += make_runs(
            *(falls, range(5)), learning_rate=rate, role="race", steps=100, noise=1e-3
        )
    return Dissection(make_setup(budget="race", race_steps=100, **setup), runs)


def test_a_race_forecasts_and_claims_no_effect() -> None:
    result = make_race()
    forecast = result.forecast[8]["sign"]
    assert (forecast.race_steps, forecast.steps, forecast.direction) == (100, 1000, -1)
    # Losses fall along a line, so the mean is half of the fall: 2·0.1·1.0/2.
    assert forecast.race.low < -0.1 < forecast.race.high
    assert result.effects == {8: {}}
    assert result.forecast_score == {}
    texts = [entry.text for entry in result.verdict]
    assert any("forecasts that the sign lowers the loss over 1,000" in t for t in texts)
    assert any("forecasts nothing about variance adaptation" in t for t in texts)
    assert not any("over 1,000 steps, the sign" in text for text in texts)
    assert {summary.learning_rate for summary in result.summaries} == {0.1}
    assert "over the race" in str(result)


@pytest.mark.parametrize(
    ("falls", "score"),
    [
        (FALLS, "right"),
        ({"m_sgd": 2.8, "m_ssd": 2.0, "m_svag": 3.4, "adam": 2.2}, "wrong"),
        (dict.fromkeys(FALLS, 2.0), "not decidable"),
    ],
)
def test_full_training_scores_the_forecast(falls: dict[str, float], score: str) -> None:
    setup = make_setup(race_steps=100)
    result = Dissection(setup, [*make_race().runs, *make_runs(falls)])
    assert result.forecast_score[8]["sign"].score == score
    (text,) = (
        entry.text
        for entry in result.verdict
        if entry.evidence["column"] == "sign score"
    )
    assert {"right": "was right", "wrong": "was wrong"}.get(score, "cannot be") in text


def test_an_effect_that_the_race_left_open_is_no_forecast() -> None:
    race = make_runs(dict.fromkeys(FALLS, 0.2), role="race", steps=100)
    result = Dissection(make_setup(race_steps=100), [*race, *make_runs()])
    score = result.forecast_score[8]["sign"]
    assert score.score == "no forecast"
    assert not score.inside


# ---- Warnings ---------------------------------------------------------------------


def test_a_clean_result_has_no_warnings() -> None:
    runs = make_runs()
    for name, fall in FALLS.items():
        runs += make_tuning_runs(name, fall)
    tunings = [make_tuning(name) for name in FALLS]
    assert Dissection(make_setup(), runs, tunings).warnings == []


def test_warnings_follow_from_the_rows() -> None:
    runs = make_runs(seeds=(1, 2))
    runs[1] = make_run("m_sgd", 2, 2.0, diverged=True)
    exploding = make_run("m_ssd", 1, -5.0)
    runs[2] = exploding
    tunings = [make_tuning("adam", at_edge=True), make_tuning("m_sgd")]
    result = Dissection(make_setup(seeds=2), runs, tunings)
    assert kinds(result) == {
        StepSizeAtGridEdge,
        TooFewSeeds,
        TooFewTuningSeeds,
        Diverged,
        LossClipped,
    }
    by_kind = {type(warning): warning for warning in result.warnings}
    assert by_kind[Diverged] == Diverged("M-SGD", 8, 0.1, 1, 2)
    clipped = by_kind[LossClipped]
    assert isinstance(clipped, LossClipped)
    assert clipped.highest == pytest.approx(
        exploding.training_loss[-1] / exploding.training_loss[0]
    )


def test_a_method_that_is_never_stable_is_named() -> None:
    candidates = ((0.1, math.nan, False), (1.0, math.nan, False))
    tuning = Tuning("adam", 8, math.nan, math.nan, candidates, (), False, 2.0, 0.0)
    result = Dissection(make_setup(), [], [tuning])
    assert kinds(result) == {NothingStable}
    assert "ADAM at batch size 8 was stable at no step size" in str(result.warnings[0])
    assert "ADAM" in str(result)
    assert "There is nothing to compare." in str(result)


def test_a_method_that_is_always_stable_is_named() -> None:
    tuning = dataclasses.replace(make_tuning("adam"), limit_seen=False)
    runs = make_tuning_runs("adam", 3.0)
    result = Dissection(make_setup(), runs, [tuning])
    assert kinds(result) == {NoLargestStepSize}
    # The largest that was tried at all, and the one that is compared.
    assert "stable up to the largest step size tried, 1;" in str(result.warnings[0])
    assert "the best of those tried, 0.1, is compared" in str(result.warnings[0])
    (adam,) = (row for row in result.summaries if row.method == "adam")
    assert adam.largest_stable_text == "≥ 0.6"


def test_costs_of_race_and_full_runs_are_apart() -> None:
    example = make_example()
    assert {(row.race_cost, row.full_cost) for row in example.summaries} == {
        (4.5, 16.5)
    }
    stored = json.loads(example.to_json())["tunings"][0]
    assert (stored["race_cost"], stored["full_cost"]) == (4.5, 16.5)
    assert Dissection.from_json(example.to_json()).tunings[0].cost == 21.0
    # Five methods; one of 25 replicates diverged half-way, and its row has all steps.
    assert example.costs[8] == (22.5, 82.5, 25.0)
    assert json.loads(example.to_json())["costs"]["8"] == {
        "race": 22.5,
        "tuning": 82.5,
        "replications": 25.0,
    }
    assert "race   full tuning   replications" in str(example)
    assert re.search(r"8 +22\.5 +82\.5 +25\n", str(example))


def test_warnings_of_the_diagnostics_are_passed_on() -> None:
    given = {
        "dominance": interval(0.5, 0.1),
        "dominance_by_cauchy": {"value": 0.9, "low": 0.8, "high": "inf"},
        "warnings": [
            {"name": "EstimatorsDisagree", "text": "They disagree."},
            {"name": "FewBatches", "text": "Measured on 3 mini-batches only."},
        ],
    }
    row = dataclasses.replace(make_measurement(), diagnostics=given)
    result = Dissection(make_setup(), [], [], [row])
    assert kinds(result) == {EstimatorsDisagree, MeasurementWarning}
    disagree, few = result.warnings
    assert "0.5 (0.4 to 0.6) and 0.9 (0.8 to –)" in disagree.sentence
    assert "FewBatches at the start of training with ADAM at batch size 8" in str(few)
    assert "Measured on 3 mini-batches only." in str(few)
    again = Dissection.from_json(result.to_json())
    assert [str(w) for w in again.warnings] == [str(w) for w in result.warnings]


def test_seeds_that_start_alike_are_noticed() -> None:
    runs = [
        dataclasses.replace(run, training_loss=(2.3, *run.training_loss[1:]))
        for run in make_runs()
    ]
    assert kinds(Dissection(make_setup(), runs)) == {SameInitialLoss}


@pytest.mark.parametrize(
    "warning",
    [
        StepSizeAtGridEdge("ADAM", 8, 0.01, 0.01, 1.0),
        NoLargestStepSize("ADAM", 8, 1e3, 1e6),
        NothingStable("ADAM", 8, math.nan, math.nan),
        TooFewSeeds(1),
        TooFewSeeds(3),
        TooFewTuningSeeds("ADAM", 8, 1),
        Diverged("ADAM", 8, 0.1, 1, 5),
        LossClipped("ADAM", 8, 1, 5, 1e-7, 1.0),
        SameInitialLoss(5, 2.3),
        EstimatorsDisagree("c", "ADAM", 8, "end", 0.5, 0.4, 0.6, 0.9, 0.8, 1.0),
        CorrelatedExamples(0.4, 0.3, 0.5),
        MeasurementWarning("FewBatches", "Measured on 3.", "ADAM", 8, "start"),
    ],
    ids=lambda warning: warning.name,
)
def test_every_warning_is_a_sentence_with_its_numbers(
    warning: DissectionWarning,
) -> None:
    assert warning.sentence.endswith(".")
    assert str(warning).startswith(f"{warning.name}: ")
    text = json.dumps(warning.to_dict())
    assert str(warning_from_dict(json.loads(text))) == str(warning)
    numbers = [v for v in dataclasses.astuple(warning) if isinstance(v, float | int)]
    assert any(f"{v:g}" in warning.sentence for v in numbers)


def test_an_unknown_warning_is_refused() -> None:
    with pytest.raises(ValueError, match="no warning named 'Boredom'"):
        warning_from_dict({"name": "Boredom"})


# ---- JSON -------------------------------------------------------------------------


def test_json_out_and_in() -> None:
    warning = CorrelatedExamples(0.4, 0.3, 0.5)
    example = make_example()
    result = Dissection(
        example.setup, example.runs, example.tunings, example.measurements, [warning]
    )
    text = result.to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    again = Dissection.from_json(text)
    assert again == result
    assert again.to_json() == text
    assert again.effects == result.effects
    assert str(again) == str(result)
    assert [str(w) for w in again.warnings] == [str(w) for w in result.warnings]
    assert warning in again.warnings
    # Tuples stay tuples.
    assert again.runs[0] == result.runs[0]
    assert again.setup == result.setup


def test_json_holds_what_other_programs_want() -> None:
    content = json.loads(make_example().to_json())
    assert content["effects"]["8"]["sign"]["decided"] is True
    assert content["verdict"][0]["evidence"]["table"] == "effects"
    assert content["warnings"][0]["name"] == "StepSizeAtGridEdge"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expected the JSON that Dissection.to_json"):
        Dissection.from_json(text)


def test_results_with_other_rows_are_not_equal() -> None:
    result = Dissection(make_setup(), make_runs())
    assert result == Dissection(make_setup(), make_runs())
    assert result != Dissection(make_setup(title="Another"), make_runs())
    assert result != Dissection(make_setup(), make_runs()[1:])
    assert result != 1


# ---- In a terminal ----------------------------------------------------------------


def test_it_fits_a_terminal() -> None:
    text = str(make_example(title="A title " * 20))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("−0.4", "M-SVAG", "Verdict", "Warnings", "1 of 5", "not decided"):
        assert part in text
    assert "\x1b" not in text


def test_rich_prints_the_same_words() -> None:
    result = make_example()
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    console.print(result)
    assert isinstance(console.file, io.StringIO)
    assert "variance adaptation" in console.file.getvalue()


def test_brackets_in_labels_are_not_markup() -> None:
    methods = {"adam": "ADAM", "x": "[bold]x[/nothing]"}
    result = Dissection(make_setup(methods=methods), make_runs({"adam": 1.0, "x": 2.0}))
    assert "[bold]x[/nothing]" in str(result)


def test_nothing_at_all_can_be_printed() -> None:
    result = Dissection(make_setup(), [])
    assert result.verdict == []
    assert "Nothing is claimed" in str(result)
    assert "0 runs" in repr(result)


def test_neither_matplotlib_nor_jinja_is_needed_to_print(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.split(".")[0] not in ("matplotlib", "jinja2"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    assert str(Dissection(make_setup(), make_runs(), [], [make_measurement()]))
