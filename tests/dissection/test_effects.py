import math

import numpy as np
import pytest

from dissect_optax.dissection._effects import (
    EFFECTS,
    Effect,
    clip_losses,
    crossovers,
    effects_between,
    last_tenth,
    outcome_of,
    outcomes_by_rate,
    paired_effect,
    pick_step_size,
    race_finalists,
    retuning_variance,
    weighted_effect,
)
from dissect_optax.dissection._rows import Run
from tests.dissection.examples import FALLS, make_run, make_runs, make_tuning_runs


def run_with(
    losses: list[float], diverged: bool = False, **metrics: list[float]
) -> Run:
    return Run(
        "adam",
        8,
        1,
        0.1,
        "replicate",
        tuple(range(len(losses))),
        tuple(losses),
        {name: tuple(values) for name, values in metrics.items()},
        diverged,
        0.0,
    )


# ---- Outcomes ---------------------------------------------------------------------


def test_the_outcome_is_the_mean_of_the_log_loss() -> None:
    losses = [3.0, 2.0, 0.5, 0.25]
    outcome = outcome_of(run_with(losses))
    assert outcome.log_loss == pytest.approx(sum(map(math.log, losses)) / 4, rel=1e-14)
    assert outcome.log_final_loss == pytest.approx(math.log(0.25))
    assert not outcome.clipped


def test_final_loss_and_metrics_are_means_over_the_last_tenth() -> None:
    # The last tenth of steps 0 to 40 begins after step 36.
    losses = [2.0] * 37 + [1.0, 1.0, 1.0, 4.0]
    outcome = outcome_of(run_with(losses, accuracy=[0.0] * 37 + [0.1, 0.2, 0.3, 0.4]))
    assert outcome.log_final_loss == pytest.approx(math.log(7 / 4))
    assert outcome.metrics["accuracy"] == pytest.approx(0.25)


@pytest.mark.parametrize("steps", [[0], [0, 100], [0, 1, 2, 3]])
def test_a_tenth_holds_the_last_evaluation_at_least(steps: list[int]) -> None:
    assert last_tenth(steps)[-1]
    assert last_tenth(steps).sum() == 1


@pytest.mark.parametrize(
    ("losses", "clipped", "binds"),
    [
        ([2.0, 1.0], [2.0, 1.0], False),
        ([2.0, 20.0], [2.0, 20.0], False),
        ([2.0, 21.0], [2.0, 20.0], True),
        ([2.0, 0.0], [2.0, 2e-6], True),
        ([2.0, -1.0], [2.0, 2e-6], True),
        ([2.0, math.inf], [2.0, 20.0], True),
        ([2.0, math.nan], [2.0, 20.0], True),
    ],
)
def test_losses_are_clipped_to_multiples_of_the_first(
    losses: list[float], clipped: list[float], binds: bool
) -> None:
    values, found = clip_losses(losses)
    assert values.tolist() == clipped
    assert found is binds


@pytest.mark.parametrize("first", [0.0, -1.0, math.nan, math.inf])
def test_a_first_loss_without_a_logarithm_is_explained(first: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite; got"):
        outcome_of(run_with([first, 1.0]))


def test_a_diverged_run_has_no_outcome() -> None:
    outcome = outcome_of(run_with([2.0, math.nan], diverged=True, accuracy=[0.5, 0.1]))
    numbers = [outcome.log_loss, outcome.log_final_loss, outcome.metrics["accuracy"]]
    assert np.isnan(numbers).all()


# ---- Effects ----------------------------------------------------------------------


def test_effects_are_those_of_the_definition() -> None:
    generator = np.random.default_rng(0)
    y = {name: dict(enumerate(generator.normal(size=6))) for name in FALLS}
    mean = {name: np.mean(list(values.values())) for name, values in y.items()}
    sgd, ssd, svag, adam = (mean[name] for name in ("m_sgd", "m_ssd", "m_svag", "adam"))
    expected = {
        "sign": ((ssd - sgd) + (adam - svag)) / 2,
        "variance_adaptation": ((svag - sgd) + (adam - ssd)) / 2,
        "interaction": (adam - svag) - (ssd - sgd),
    }
    for name, weights in EFFECTS.items():
        assert weighted_effect(y, weights).estimate == pytest.approx(expected[name])


def test_the_interval_is_students() -> None:
    # Differences 1, 2, 3, 4: mean 2.5, deviation sqrt(5/3), t = 3.182446.
    before = dict.fromkeys(range(4), 0.0)
    effect = paired_effect(before, {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0})
    assert effect.half_width == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)


def test_the_spread_of_retuning_is_added_in_quadrature() -> None:
    values = {"a": {0: 0.0, 1: 0.0, 2: 0.0}, "b": {0: 1.0, 1: 1.1, 2: 1.2}}
    weights = {"b": 1.0, "a": -0.5}
    narrow = weighted_effect(values, weights)
    wide = weighted_effect(values, weights, retuning_variances={"a": 0.04, "b": 0.01})
    t = 4.302653
    assert wide.half_width**2 - narrow.half_width**2 == pytest.approx(
        t**2 * (0.01 + 0.25 * 0.04), rel=1e-6
    )
    assert wide.retuning == pytest.approx(math.sqrt(0.02))
    assert wide.estimate == narrow.estimate


def test_what_seeds_share_cancels() -> None:
    shared = {seed: 10.0 * seed for seed in range(5)}
    effect = paired_effect(shared, {seed: v - 0.3 for seed, v in shared.items()})
    assert effect.estimate == pytest.approx(-0.3)
    assert effect.half_width == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("pairs", [0, 1])
def test_fewer_than_two_pairs_have_an_unbounded_interval(pairs: int) -> None:
    before = {seed: 0.0 for seed in range(pairs)} | {7: math.nan}
    effect = paired_effect(before, {seed: -1.0 for seed in range(pairs)} | {7: 1.0})
    assert (effect.low, effect.high) == (-math.inf, math.inf)
    assert (effect.pairs, effect.diverged) == (pairs, 1)
    assert not effect.decided


@pytest.mark.parametrize(
    ("effect", "decided"),
    [
        (Effect(-0.2, -0.3, -0.1, 5), True),
        (Effect(0.2, 0.1, 0.3, 5), True),
        (Effect(-0.2, -0.5, 0.1, 5), False),
        (Effect(-0.049, -0.05, -0.048, 5), False),
        (Effect(-0.05, -0.06, -0.04, 5), True),
        (Effect(-0.049, -0.05, -0.048, 5, smallest=0.0), True),
        (Effect(math.nan, -math.inf, math.inf, 0), False),
    ],
)
def test_small_or_uncertain_effects_are_not_decided(
    effect: Effect, decided: bool
) -> None:
    assert effect.decided is decided


def test_effects_of_missing_methods_are_missing() -> None:
    falls = {name: FALLS[name] for name in ("m_sgd", "adam")} | {"muon": 3.0}
    found = effects_between(make_runs(falls), [])
    assert found.effects == {}
    assert set(found.comparisons) == {"adam − m_sgd", "muon − adam"}
    assert not effects_between(make_runs({"muon": 3.0}), []).comparisons


def test_seeds_with_a_diverged_run_are_left_out_and_counted() -> None:
    runs = make_runs()
    runs[7] = make_run("m_ssd", 3, 2.8, diverged=True)
    found = effects_between(runs, [])
    assert (found.effects["sign"].pairs, found.effects["sign"].diverged) == (4, 1)
    assert found.comparisons["adam − m_svag"].effect.pairs == 5


def test_a_crossover_is_between_neighbouring_decided_batch_sizes() -> None:
    undecided = {name: 2.0 for name in FALLS}
    reverse = {"m_sgd": 3.4, "m_ssd": 2.2, "m_svag": 2.8, "adam": 2.0}
    by_batch_size = {
        size: effects_between(make_runs(falls, batch_size=size), [])
        for size, falls in {128: reverse, 32: undecided, 8: FALLS}.items()
    }
    (sign,) = (entry for entry in crossovers(by_batch_size) if entry.column == "sign")
    assert (sign.low, sign.high) == (8, 128)
    assert 8 < sign.estimate < 128
    del by_batch_size[128]
    assert crossovers(by_batch_size) == []


# ---- Step sizes -------------------------------------------------------------------


def test_a_step_size_that_diverged_once_is_not_picked() -> None:
    runs = make_tuning_runs("adam", 3.4)
    outcomes = outcomes_by_rate(runs)
    assert pick_step_size(outcomes) == 0.1
    outcomes[0.1][91] = math.nan
    assert pick_step_size(outcomes) == 0.06
    nothing = {rate: dict.fromkeys(by, math.nan) for rate, by in outcomes.items()}
    assert math.isnan(pick_step_size(nothing))


def test_retuning_adds_nothing_where_every_seed_picks_the_same() -> None:
    outcomes = outcomes_by_rate(make_tuning_runs("adam", 3.4))
    assert retuning_variance(outcomes) == 0.0


def test_retuning_adds_the_cost_of_other_picks() -> None:
    # Two of three seeds prefer 0.1 by 0.3 each, the third prefers 1 by 0.3: 0.1 wins by
    # 0.1 on the mean. Resamples with at least two draws of the third seed pick 1:
    # 3·(1/3)²·(2/3) + (1/3)³ = 7/27 of them.
    outcomes = {0.1: {0: -0.3, 1: -0.3, 2: 0.0}, 1.0: {0: 0.0, 1: 0.0, 2: -0.3}}
    expected = 7 / 27 * 0.1**2 * 3 / 2
    assert retuning_variance(outcomes) == pytest.approx(expected, rel=0.1)
    doubled = {
        rate: {seed: 2 * value for seed, value in by_seed.items()}
        for rate, by_seed in outcomes.items()
    }
    assert retuning_variance(outcomes, doubled) == pytest.approx(
        4 * retuning_variance(outcomes)
    )


@pytest.mark.parametrize(
    "outcomes",
    [
        {},
        {0.1: {0: -1.0}},
        {0.1: {0: -1.0}, 1.0: {0: -2.0}},
        {0.1: {0: math.nan, 1: -1.0}, 1.0: {0: -1.0, 1: math.nan}},
    ],
)
def test_too_few_tuning_runs_say_nothing_about_retuning(
    outcomes: dict[float, dict[int, float]],
) -> None:
    assert retuning_variance(outcomes) == 0.0


def test_finalists_are_the_best_full_length_runs_of_the_race() -> None:
    runs = []
    for rate, fall in ((0.1, 2.0), (0.3, 3.0), (1.0, 9.0)):
        # The largest step size looks best, and was pruned after 30 steps.
        steps = 30 if rate == 1.0 else 100
        runs += make_runs(
            {"adam": fall},
            seeds=(0, 1),
            learning_rate=rate,
            role="race",
            steps=steps,
            share=steps / 100,
        )
    assert {run.learning_rate for run in race_finalists(runs)} == {0.3}
    assert race_finalists([]) == []


# ---- Repetitions ------------------------------------------------------------------


def repetition(
    generator: np.random.Generator,
    *,
    curvature: float,
    noise: float,
    effect: float,
    retuning: bool,
) -> dict[str, Effect]:
    """The effects between four methods, tuned on three seeds, compared on five.

    The outcome is a parabola over the logarithm of the step size, the same for all
    methods, plus noise that seeds share, plus noise of single runs; `effect` is what
    the sign adds.
    """
    places = np.arange(7) / 3
    bowl = curvature * (places - generator.uniform(places[1], places[-2])) ** 2 / 2
    shared = generator.normal(0, 0.2, 8)
    outcomes, variances = {}, {}
    for name in FALLS:
        base = bowl + effect * (name in ("m_ssd", "adam"))
        tuning = base[:, None] + shared[:3] + generator.normal(0, noise, (7, 3))
        by_rate = {
            float(rate): dict(enumerate(row.tolist()))
            for rate, row in enumerate(tuning)
        }
        picked = int(pick_step_size(by_rate))
        variances[name] = retuning_variance(by_rate) if retuning else 0.0
        replicates = base[picked] + shared[3:] + generator.normal(0, noise, 5)
        outcomes[name] = dict(enumerate(replicates.tolist()))
    return {
        name: weighted_effect(outcomes, weights, retuning_variances=variances)
        for name, weights in EFFECTS.items()
    }


@pytest.mark.parametrize("curvature", [0.5, 3.0])
def test_nothing_is_claimed_between_methods_that_are_the_same(curvature: float) -> None:
    generator = np.random.default_rng(1)
    found = [
        repetition(generator, curvature=curvature, noise=0.1, effect=0.0, retuning=True)
        for _ in range(300)
    ]
    for name in EFFECTS:
        assert np.mean([effects[name].decided for effects in found]) <= 0.05


def test_seeds_alone_would_claim_more_than_they_should() -> None:
    """So the test above would see that retuning is left out."""
    generator = np.random.default_rng(1)
    found = [
        repetition(generator, curvature=3.0, noise=0.1, effect=0.0, retuning=False)
        for _ in range(300)
    ]
    claims = [np.mean([e[name].excludes_zero for e in found]) for name in EFFECTS]
    assert max(claims) > 0.055


def test_a_real_effect_is_found() -> None:
    generator = np.random.default_rng(2)
    found = [
        repetition(generator, curvature=3.0, noise=0.05, effect=-0.3, retuning=True)
        for _ in range(100)
    ]
    assert np.mean([e["sign"].decided for e in found]) > 0.95
    assert np.mean([e["sign"].low <= -0.3 <= e["sign"].high for e in found]) >= 0.93
    assert np.mean([e["interaction"].decided for e in found]) <= 0.08
