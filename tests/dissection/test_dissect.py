"""`dissect` from its arguments to a result: resumed, interrupted, incomplete."""

import dataclasses
import errno
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do
from dissect_optax.dissection import (
    FOUR_METHODS,
    METHODS,
    Dissection,
    Settings,
    SilentMonitor,
    Store,
    UserError,
    dissect_problem,
)
from dissect_optax.dissection import _dissect as dissecting
from dissect_optax.dissection import _records as records
from dissect_optax.dissection import _running as running
from dissect_optax.dissection._effects import clip_losses
from dissect_optax.dissection._methods import method_from
from dissect_optax.dissection._racing import Raced
from dissect_optax.dissection._user_problem import user_problem
from dissect_optax.dissection._warnings import LossClipped, LossLooksBatched
from tests.dissection.small_problems import arguments, init, loss, mean_loss, points

pytestmark = pytest.mark.usefixtures("quick_compilation")

REPOSITORY = Path(__file__).parents[2]
SETTINGS = Settings(steps=20, batch_size=8, evaluation_interval=1)
TITLE = "A [red]line[/red] <b>$x^"
NAMES = ("start", "middle", "end")


def metrics(w, example):
    return {"error": jnp.abs(example[0] @ w - example[1])}


def make_problem(loss=loss, init=init, data=None, **changes):
    test = points(10, shift=0.1)
    fixed = {"settings": SETTINGS, "metrics": metrics, "title": TITLE}
    data = points() if data is None else data
    return user_problem(loss, init, data, test, **(fixed | changes))[0]


@pytest.fixture(scope="module")
def problem():
    """One for all tests, so that its programs are compiled once."""
    return make_problem()


def run(problem, *methods, **changes):
    fixed = {"seeds": 2, "level": None, "monitor": SilentMonitor(), "batch_sizes": (8,)}
    chosen = [METHODS.get(method, method) for method in methods or ("m_ssd",)]
    return dissect_problem(problem, chosen, **(fixed | changes))


@pytest.fixture(scope="module")
def four(problem, quick_compilation):
    return run(problem, *FOUR_METHODS, level="cheap")


@pytest.fixture(scope="module")
def in_memory(problem, quick_compilation):
    return run(problem)


def content(result):
    """Everything but times."""
    runs = [dataclasses.replace(row, seconds=0.0) for row in result.runs]
    return str((runs, result.tunings, result.measurements))


class Stopped(Exception):
    """Training was about to go on."""


def stop_after(monkeypatch, calls):
    """Lets so many calls of the training loop pass."""
    advance, left = running.advance, iter(range(calls))

    def counted(*args):
        if next(left, None) is None:
            raise Stopped
        return advance(*args)

    monkeypatch.setattr(running, "advance", counted)


# ---- The rows ---------------------------------------------------------------------


def test_every_method_is_raced_tuned_and_replicated(four):
    assert {run.method for run in four.runs} == set(FOUR_METHODS)
    for method in FOUR_METHODS:
        rows = [row for row in four.runs if row.method == method]
        tuning = four.tuning(method, 8)
        lengths = {
            role: {max(row.steps) for row in rows if row.role == role}
            for role in ("race", "tuning", "replicate")
        }
        # A diverged run is shorter.
        assert max(lengths["race"]) == four.setup.race_steps == 10
        assert max(lengths["tuning"]) == 20
        replicates = [row for row in rows if row.role == "replicate"]
        assert [row.seed for row in replicates] == [1, 2]
        assert {row.learning_rate for row in replicates} == {tuning.learning_rate}
        assert len({row.seed for row in rows if row.role == "tuning"}) == 3
        assert len(tuning.picks) == 3
        assert tuning.learning_rate in [rate for rate, _, _ in tuning.candidates]
        steps = {
            role: sum(row.steps[-1] for row in rows if row.role == role)
            for role in ("race", "tuning")
        }
        assert tuning.race_cost == pytest.approx(steps["race"] / 20)
        assert tuning.full_cost == pytest.approx(steps["tuning"] / 20)
        assert 3 <= tuning.full_cost <= 60


def test_equal_seeds_share_initial_parameters(four):
    first = {}
    for row in four.runs:
        first.setdefault(row.seed, set()).add(row.training_loss[0])
    assert {len(losses) for losses in first.values()} == {1}
    assert len(set.union(*first.values())) == len(first) == 5


def test_effects_are_those_of_the_replicates(four):
    def outcome(method, seed):
        (row,) = (
            row
            for row in four.runs
            if (row.method, row.seed, row.role) == (method, seed, "replicate")
        )
        clipped = np.clip(row.training_loss, 0, 10 * row.training_loss[0])
        return np.mean(np.log(clipped))

    y = {m: np.mean([outcome(m, seed) for seed in (1, 2)]) for m in FOUR_METHODS}
    expected = {
        "sign": (y["m_ssd"] - y["m_sgd"] + y["adam"] - y["m_svag"]) / 2,
        "variance_adaptation": (y["m_svag"] - y["m_sgd"] + y["adam"] - y["m_ssd"]) / 2,
        "interaction": y["adam"] - y["m_svag"] - y["m_ssd"] + y["m_sgd"],
    }
    for name, value in expected.items():
        effect = four.effects[8][name]
        assert effect.estimate == pytest.approx(value, abs=1e-6)
        assert effect.pairs == 2
        assert effect.low < effect.estimate < effect.high


def test_measurements_are_at_start_middle_and_end_of_adam(four):
    assert [(row.method, row.when, row.step) for row in four.measurements] == [
        ("adam", when, step) for when, step in zip(NAMES, (0, 10, 20), strict=True)
    ]
    for row in four.measurements:
        assert row.diagnostics["noise_scale"]["value"] != row.step


def test_metrics_and_test_loss_are_in_the_rows(four):
    for row in four.runs:
        assert {"test_loss", "test_error", "training_error"} <= row.metrics.keys()
        assert len(row.metrics["test_error"]) == len(row.steps)
    assert four.secondary["test_error"][8].effects.keys() == four.effects[8].keys()


def test_a_result_is_shown_and_stored(four, tmp_path):
    assert Dissection.from_json(four.to_json()) == four
    lines = str(four).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(TITLE)
    page = four.to_html(tmp_path / "new" / "report.html").read_text()
    assert "A [red]line[/red] &lt;b&gt;$x^" in page
    assert "<b>$x^" not in page
    assert four.warnings[0].name == "TooFewSeeds"


# ---- Less than everything ---------------------------------------------------------


def test_a_race_forecasts_and_has_no_effects(problem, four):
    result = run(problem, *FOUR_METHODS, budget="race")
    assert {row.role for row in result.runs} == {"race"}
    assert {max(row.steps) for row in result.runs} <= set(range(11))
    assert result.effects == {8: {}}
    with pytest.raises(KeyError, match=r"ask for `result\.forecast`"):
        result.effects[8]["sign"]
    for name, forecast in result.forecast[8].items():
        assert (forecast.race_steps, forecast.steps) == (10, 20)
        assert forecast.race.pairs == 3
        assert math.isfinite(forecast.race.half_width)
        # The full run has raced in the same way.
        assert forecast.race == four.forecast[8][name].race
        assert name in four.forecast_score[8]
    assert all("forecast" in reading.text for reading in result.verdict)
    for tuning in result.tunings:
        assert tuning.race_cost == four.tuning(tuning.method, 8).race_cost > 0
        assert tuning.full_cost == 0


def test_one_seed_decides_nothing(problem):
    result = run(problem, "m_sgd", "adam", seeds=1)
    effect = result.comparisons[8]["adam − m_sgd"].effect
    assert (effect.pairs, effect.half_width, effect.decided) == (1, math.inf, False)
    (warning,) = (w for w in result.warnings if w.name == "TooFewSeeds")
    assert "An interval from 1 seed is unbounded" in warning.sentence
    assert result.effects == {8: {}}


@pytest.fixture(scope="module")
def with_extras(problem, quick_compilation):
    again = method_from("adam_again", lambda rate: do.adam(rate))
    uphill = method_from("uphill", lambda rate: optax.sgd(-rate))
    return run(problem, "adam", again, uphill)


def test_nothing_is_claimed_between_equal_methods(with_extras, four):
    effect = with_extras.comparisons[8]["adam_again − adam"].effect
    assert effect.estimate == pytest.approx(0, abs=1e-6)
    assert not effect.decided
    # Also not because of other methods beside it.
    assert with_extras.tuning("adam", 8) == four.tuning("adam", 8)


def test_a_method_that_is_stable_nowhere_is_left_out(with_extras):
    assert {row.method for row in with_extras.runs} == {"adam", "adam_again"}
    assert "uphill − adam" not in with_extras.comparisons[8]
    (warning,) = (w for w in with_extras.warnings if w.name == "NothingStable")
    assert warning.method == "uphill"
    assert warning.smallest <= 1e-10
    assert warning.largest >= 0.1
    assert "stable at no step size from 3e-11 to 0.1" in warning.sentence
    tuning = with_extras.tuning("uphill", 8)
    assert not any(stable for _, _, stable in tuning.candidates)
    assert tuning.cost > 1
    assert "uphill" in str(with_extras)


def separable_loss(w, example):
    x, _ = example
    return jax.nn.softplus(-x[0] * jnp.sign(x[0]) * w[0]) + 0 * w[1]


def test_separable_data_do_not_end_the_dissection():
    # The larger the step, the smaller the loss, down to zero in float32.
    problem = make_problem(separable_loss, lambda key: 0.1 * init(key))
    result = run(problem, "m_sgd")
    tuning = result.tuning("m_sgd", 8)
    assert not tuning.limit_seen
    assert tuning.learning_rate <= tuning.largest_stable <= 1e6
    assert [run.seed for run in result.runs if run.role == "replicate"] == [1, 2]
    (warning,) = (w for w in result.warnings if w.name == "NoLargestStepSize")
    assert warning.learning_rate == tuning.learning_rate
    assert warning.largest == max(run.learning_rate for run in result.runs)
    assert result.summaries[0].largest_stable_text in result._repr_html_()


def test_an_unstable_full_run_after_a_stable_race_is_left_out(problem, monkeypatch):
    def unstable(job, protocol, method):
        if protocol.settings.steps == 20:
            raise dissecting.NoStableStepSize("Not in full runs.")

    monkeypatch.setattr(dissecting, "tune_by_race", unstable)
    result = run(problem)
    assert not result.runs
    assert [warning.name for warning in result.warnings] == ["NothingStable"]


@pytest.mark.parametrize(("batch_size", "measured"), [(1, 0), (2, 1), (64, 1), (65, 0)])
def test_measured_is_where_there_is_a_variance(
    problem, batch_size, measured, monkeypatch
):
    # One example has no variance; mini-batches to measure on are disjoint.
    diagnosed = []

    def replicate(job, *_):
        diagnosed.append(job.diagnosis is not None)
        return []

    raced = Raced(0.1, 0.1, (), {}, {}, False, True, 0.5, 0.5)
    monkeypatch.setattr(dissecting, "tune_by_race", lambda *_: raced)
    monkeypatch.setattr(dissecting, "replicate", replicate)
    run(problem, "adam", "m_ssd", level="cheap", batch_sizes=(batch_size,))
    assert diagnosed == [measured, False]


def test_several_batch_sizes_are_in_ascending_order(monkeypatch):
    def found(problem, methods, batch_sizes, **_):
        return batch_sizes

    monkeypatch.setattr(dissecting, "dissect_problem", found)
    assert do.dissect(**arguments(batch_size=(64, 8))) == (8, 64)


# ---- Forms of the loss ------------------------------------------------------------


def test_a_loss_of_batches_trains_like_one_of_examples(in_memory):
    def batched_metrics(w, batch):
        return {"error": jnp.mean(metrics(w, batch)["error"])}

    other = make_problem(mean_loss, metrics=batched_metrics, batched=True)
    result = run(other)
    assert [t.learning_rate for t in result.tunings] == [
        t.learning_rate for t in in_memory.tunings
    ]
    for row, expected in zip(result.runs, in_memory.runs, strict=True):
        np.testing.assert_allclose(row.training_loss, expected.training_loss, rtol=1e-4)
        np.testing.assert_allclose(
            row.metrics["test_error"], expected.metrics["test_error"], rtol=1e-3
        )


@pytest.fixture(scope="module")
def noisy(quick_compilation):
    """A loss with random numbers, a regularizer, and seeds that begin alike."""

    def noisy_loss(w, example, key):
        x, y = example
        return loss(w, (x, y + jax.random.normal(key)))

    noisy_problem = make_problem(
        noisy_loss, np.array([3.0, 3.0]), regularizer=lambda w: 0.1 * w @ w
    )
    return run(noisy_problem), run(noisy_problem)


def test_a_random_loss_is_reproducible(noisy):
    first, second = map(content, noisy)
    assert first == second


def test_the_regularizer_is_part_of_the_training_loss(noisy):
    for row in noisy[0].runs:
        data_loss = row.metrics["training_data_loss"]
        assert row.training_loss[0] == pytest.approx(data_loss[0] + 1.8, rel=1e-5)
    assert noisy[0].setup.regularizer


def test_seeds_that_begin_alike_are_a_warning(noisy, in_memory):
    (warning,) = (w for w in noisy[0].warnings if w.name == "SameInitialLoss")
    assert "it ignores its key" in warning.sentence
    assert "SameInitialLoss" not in [w.name for w in in_memory.warnings]


def test_warnings_about_the_arguments_are_in_the_result(problem, monkeypatch):
    monkeypatch.setattr(dissecting, "_dissect_method", lambda *_: None)
    given = LossLooksBatched(1.0, 2.0)
    result = run(problem, warnings=[given])
    assert given in result.warnings
    assert given in Dissection.from_json(result.to_json()).warnings


def test_a_loss_below_zero_is_a_sentence():
    with pytest.raises(UserError, match="add a constant"):
        clip_losses([-1.0, -2.0])
    lowest = [LossClipped("ADAM", 8, 1, 5, low, 1.0).sentence for low in (-2.0, 1e-7)]
    assert ["add a constant" in sentence for sentence in lowest] == [True, False]


# ---- A directory ------------------------------------------------------------------


def test_a_stopped_dissection_goes_on(problem, in_memory, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 25)
        with pytest.raises(Stopped):
            run(problem, directory=tmp_path)
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("rate*.json")}
    assert finished
    assert content(run(problem, directory=str(tmp_path))) == content(in_memory)
    # What was finished is not trained again.
    assert all(p.stat().st_mtime_ns == time for p, time in finished.items())
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        again = run(make_problem(), directory=tmp_path)
        assert content(again) == content(in_memory)
        check_that_others_are_told_apart(tmp_path)


def check_that_others_are_told_apart(directory):
    """Runs of `problem` are in the directory, and nothing can be trained."""
    for other in (
        make_problem(lambda w, example: 2 * loss(w, example)),
        make_problem(init=lambda key: 2 * init(key)),
        make_problem(settings=dataclasses.replace(SETTINGS, steps=40)),
    ):
        with pytest.raises(Stopped):
            run(other, directory=directory)
    with pytest.raises(UserError, match="was trained on other data"):
        run(make_problem(data=points(shift=1.0)), directory=directory)
    # More seeds need more runs, fewer do not.
    with pytest.raises(Stopped):
        run(make_problem(), directory=directory, seeds=3)
    assert len(run(make_problem(), directory=directory, seeds=1).runs) > 3


def test_a_full_disk_loses_nothing(problem, in_memory, tmp_path, monkeypatch):
    fsync, left = records.os.fsync, iter(range(12))

    def full(descriptor):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as found:
            run(problem, directory=tmp_path)
    assert str(tmp_path) in found.value.filename
    assert "the same call goes on from them" in found.value.__notes__[0]
    assert len(list(tmp_path.rglob("rate*.json"))) == 12
    assert not list(tmp_path.rglob(".rate*"))
    assert content(run(problem, directory=tmp_path)) == content(in_memory)


def test_another_process_is_waited_for(problem, tmp_path):
    entered, finish = threading.Event(), threading.Event()

    def other():
        with Store(tmp_path).lock("dissection", "m_ssd", pytest.fail):
            entered.set()
            finish.wait(60)

    class Notices(SilentMonitor):
        said: list[str] = []  # noqa: RUF012

        def say(self, sentence):
            self.said.append(sentence)
            finish.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    result = run(problem, directory=tmp_path, monitor=Notices())
    thread.join()
    assert "Another process works in" in Notices.said[0]
    assert result.runs


PROCESS = """
import sys
import dissect_optax as do
from tests.dissection.small_problems import arguments
print(do.dissect(**arguments(directory=sys.argv[1])).to_json())
"""


def test_two_processes_share_a_directory(tmp_path, monkeypatch):
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as other:
        mine = do.dissect(**arguments(directory=tmp_path))
        output, _ = other.communicate(timeout=300)
    assert other.returncode == 0
    assert content(Dissection.from_json(output)) == content(mine)
    # Neither trained a run of the other again: the same functions are the same runs.
    programs = {
        json.loads(path.read_text())["config"]["description"]["program"]
        for path in tmp_path.rglob("rate*.json")
    }
    assert len(programs) == 1
