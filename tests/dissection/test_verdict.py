import math
import re
from typing import Any

import pytest

from dissect_optax.dissection._effects import Effect, share_interval
from dissect_optax.dissection._result import Dissection
from dissect_optax.dissection._verdict import (
    Reading,
    decimals_for,
    effect_numbers,
    with_decimals,
)
from tests.dissection.examples import (
    FALLS,
    LABELS,
    interval,
    make_example,
    make_measurement,
    make_run,
    make_runs,
    make_setup,
)


def dissect(falls: dict[str, float] = FALLS, **kwargs: Any) -> Dissection:
    return Dissection(make_setup(), make_runs(falls, **kwargs))


def reading(result: Dissection, column: str, table: str = "effects") -> Reading:
    (found,) = (
        entry
        for entry in result.verdict
        if entry.evidence["table"] == table and entry.evidence["column"] == column
    )
    return found


def test_a_changed_number_changes_the_sentence_and_its_evidence() -> None:
    before = dissect()
    # ADAM twice as good: the sign gains more.
    after = dissect(FALLS | {"adam": 6.8})
    for column in ("sign", "variance_adaptation", "interaction"):
        old, new = reading(before, column), reading(after, column)
        assert old.text != new.text
        assert old.evidence["estimate"] == before.effects[8][column].estimate
        assert new.evidence["estimate"] == after.effects[8][column].estimate
        for result, entry in ((before, old), (after, new)):
            estimate, low, high = effect_numbers(result.effects[8][column])
            assert estimate.lstrip("+−") in entry.text
            assert f"{low} to {high}" in entry.text


def test_a_changed_sign_changes_the_verb() -> None:
    better, worse = dissect(), dissect({**FALLS, "m_ssd": 1.0, "adam": 1.2})
    assert "the sign lowers the mean log training loss" in reading(better, "sign").text
    assert "the sign raises the mean log training loss" in reading(worse, "sign").text


def test_no_difference_is_said_where_none_is_seen() -> None:
    result = dissect(dict.fromkeys(FALLS, 2.0))
    for column in ("sign", "variance_adaptation", "interaction"):
        text = reading(result, column).text
        assert "no difference is seen" in text
        assert "lowers" not in text
        assert "raises" not in text
        assert "interact:" not in text


def test_a_difference_too_small_to_count_is_said_to_be() -> None:
    falls = {"m_sgd": 2.0, "m_ssd": 2.06, "m_svag": 2.0, "adam": 2.06}
    result = dissect(falls, noise=1e-4)
    effect = result.effects[8]["sign"]
    assert effect.excludes_zero
    assert "no difference that counts" in reading(result, "sign").text
    assert "is less than 0.05" in reading(result, "sign").text


def test_one_seed_is_a_sentence() -> None:
    text = reading(dissect(seeds=(1,)), "sign").text
    assert "an interval from one seed is unbounded" in text
    assert "n = 1" in text
    assert "lowers" not in text


def test_pairs_that_all_diverged_are_a_sentence() -> None:
    runs = [
        make_run(method, seed, fall, diverged=method == "m_svag")
        for method, fall in FALLS.items()
        for seed in (1, 2, 3)
    ]
    result = Dissection(make_setup(seeds=3), runs)
    text = reading(result, "sign").text
    assert "nothing can be said about the sign" in text
    assert "diverged at each of 3 seeds" in text
    share = reading(result, "diverged", "methods")
    assert "3 of 3 replicates of M-SVAG diverged" in share.text
    low, high = share_interval(3, 3)
    assert f"{low:.2f} to {high:.2f}, n = 3" in share.text


def test_every_sentence_has_number_interval_and_n() -> None:
    for entry in make_example().verdict:
        assert re.search(r"\d", entry.text)
        assert "95 % interval" in entry.text, entry.text
        assert re.search(r"n = \d", entry.text), entry.text
        assert entry.evidence["table"]


def test_every_sentence_names_batch_size_and_steps() -> None:
    for entry in make_example().verdict:
        assert "batch size" in entry.text
        assert "step" in entry.text


def test_evidence_is_the_cell_of_the_result() -> None:
    result = make_example()
    seen = set()
    for entry in result.verdict:
        cell = entry.evidence
        if cell["table"] == "effects":
            effect = result.effects[cell["batch_size"]][cell["column"]]
        elif cell["table"] == "comparisons":
            effect = result.comparisons[cell["batch_size"]][cell["column"]].effect
        elif cell["table"] == "secondary":
            row = result.secondary[cell["quantity"]][cell["batch_size"]]
            effect = row.effects[cell["column"]]
        else:
            continue
        seen.add(cell["table"])
        assert (cell["estimate"], cell["low"], cell["high"], cell["pairs"]) == (
            effect.estimate,
            effect.low,
            effect.high,
            effect.pairs,
        )
    assert seen == {"effects", "comparisons", "secondary"}


def test_other_methods_are_compared_against_adam() -> None:
    methods = LABELS | {"muon": "Muon"}
    runs = make_runs(FALLS | {"muon": 6.0})
    result = Dissection(make_setup(methods=methods), runs)
    text = reading(result, "muon − adam", "comparisons").text
    assert "Muon instead of ADAM lowers" in text


def test_measurements_are_about_the_next_step_only() -> None:
    rows = [make_measurement(when=when) for when in ("start", "end")]
    texts = [entry.text for entry in Dissection(make_setup(), [], [], rows).verdict]
    assert len(texts) == 6
    for text in texts:
        assert "next step" in text
    assert any("at batch size 8 (step 1,000)" in text for text in texts)
    improvements = [text for text in texts if "improvement" in text]
    assert all("does not forecast training" in text for text in improvements)


def test_the_noise_scale_recommends_no_batch_size() -> None:
    row = make_measurement()
    noisy = {**row.diagnostics, "noise_scale": interval(4096.0, 100.0)}
    changed = type(row)(row.method, 8, "start", 0, noisy)
    (text,) = (
        entry.text
        for entry in Dissection(make_setup(), [], [], [changed]).verdict
        if entry.evidence["column"] == "noise_scale"
    )
    # 4096/8 of the squared norm, and no other batch size.
    assert "512 times" in text
    assert "4096" not in text.replace(",", "")
    words = " ".join(entry.text for entry in make_example().verdict).lower()
    assert not re.search(r"recommend|should|prefer|optimal|use a", words)


@pytest.mark.parametrize("unknown", [math.nan, math.inf, None, "inf"])
def test_unbounded_measurements_are_sentences(unknown: float | str | None) -> None:
    row = make_measurement()
    entry = {"value": 3.0, "low": 0.0, "high": unknown}
    changed = type(row)(row.method, 8, "start", 0, {"noise_scale": entry})
    (only,) = Dissection(make_setup(), [], [], [changed]).verdict
    assert "95 % interval unbounded" in only.text


def test_the_scope_names_steps_batch_sizes_and_schedule() -> None:
    setup = make_setup(batch_sizes=(8, 32, 128), schedule="cosine to zero")
    text = Dissection(setup, []).scope
    assert "beyond 1,000 steps, batch sizes 8, 32 and 128" in text
    assert "cosine to zero" in text
    assert "b2 = 0.999" in text


@pytest.mark.parametrize(
    ("effect", "texts"),
    [
        (Effect(-0.5, -0.6, -0.4, 5), ("−0.50", "−0.60", "−0.40")),
        (Effect(2e-3, 1e-3, 3e-3, 5), ("+0.0020", "+0.0010", "+0.0030")),
        # An end that excludes zero by little does not read as zero.
        (Effect(0.1, 0.0004, 0.1996, 5), ("+0.1000", "+0.0004", "+0.1996")),
        (Effect(-0.5, -math.inf, math.inf, 1), ("−0.50", "−∞", "+∞")),
        (Effect(math.nan, -math.inf, math.inf, 0), ("–", "−∞", "+∞")),
        (Effect(0.0, 0.0, 0.0, 5), ("0.00", "0.00", "0.00")),
    ],
)
def test_numbers_have_the_digits_that_the_interval_bears(
    effect: Effect, texts: tuple[str, str, str]
) -> None:
    assert effect_numbers(effect) == texts


def test_tiny_numbers_have_no_sign_and_huge_ones_two_decimals() -> None:
    assert with_decimals(-1e-9, 2) == "0.00"
    assert decimals_for(1e6) == 2
    assert decimals_for(1e-30) == 6
