"""Runs that are killed, interrupted or resumed end with the same records."""

import dataclasses
import io
import itertools
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from rich.console import Console

from dissect_optax.dissection import (
    METHODS,
    Diagnosis,
    Method,
    Monitor,
    SilentMonitor,
    Store,
    UserError,
    complete,
    evaluate,
    fingerprint,
    get_method,
)
from dissect_optax.dissection import _running as running
from tests.dissection import toys
from tests.dissection.toys import SETTINGS, job, train, without_seconds

REPOSITORY = Path(__file__).parents[2]
CHECKPOINTS = "toy/m_svag/unfinished/*/checkpoints"
RECORDS = "toy/m_svag/rate*.json"
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
REPORT = "dissect_optax.dissection._progress.GroupReport"


@pytest.fixture
def begun_at(monkeypatch):
    """The steps at which groups begin, or go on."""
    steps = []
    begin = running.GroupReport.begin

    def noted(report, step, newest):
        steps.append(step)
        begin(report, step, newest)

    monkeypatch.setattr(f"{REPORT}.begin", noted)
    return steps


def with_steps(root, steps, **changes):
    return job(root, settings=dataclasses.replace(SETTINGS, steps=steps), **changes)


# ---- Interrupts -------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_loses_nothing(number, tmp_path, stop_at_first_report, begun_at, capsys):
    runs = job(tmp_path)
    stop_at_first_report(lambda: train(runs), number)
    assert "Stopping in a moment" in capsys.readouterr().err
    assert not list(tmp_path.glob(RECORDS))
    # Nothing is left of the signal.
    record = train(runs)
    assert begun_at == [0, 1]
    assert without_seconds(record) == without_seconds(train(job(None)))


def interrupted_by(function):
    """The function, with a Ctrl-C that arrives while it works."""

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return function(*arguments)

    return interrupted


def test_interrupt_before_the_first_step_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_begin", interrupted_by(running._begin))
    monkeypatch.setattr(running, "advance", pytest.fail)
    with pytest.raises(KeyboardInterrupt):
        train(job(tmp_path))


def test_interrupt_after_the_last_step_keeps_the_record(tmp_path, monkeypatch):
    runs = job(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(running, "environment", interrupted_by(running.environment))
        with pytest.raises(KeyboardInterrupt):
            train(runs)
    monkeypatch.setattr(running, "_run_group", pytest.fail)
    train(runs)


@pytest.mark.parametrize(("evaluation", "checkpoints"), [(0, []), (1, ["10"])])
def test_interrupt_ends_an_evaluation(evaluation, checkpoints, tmp_path, monkeypatch):
    evaluations = itertools.count()

    def interrupted(*arguments, stop, mesh):
        if next(evaluations) == evaluation:
            signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments, stop=stop, mesh=mesh)

    runs = job(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(running, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(runs)
    found = [path.name for path in tmp_path.glob(f"{CHECKPOINTS}/*")]
    assert found == checkpoints
    record = train(runs)
    assert without_seconds(record) == without_seconds(train(job(None)))
    assert [line.step for line in record.evaluations] == [0, 10, 20]


def test_interrupt_of_runs_in_memory_begins_them_again(stop_at_first_report):
    runs = job(None)
    stop_at_first_report(lambda: train(runs))
    assert without_seconds(train(runs)) == without_seconds(train(job(None)))


class WaitingMonitor(SilentMonitor):
    """Sends a Ctrl-C when it is told of another process."""

    def say(self, sentence):
        assert "Another process works in" in sentence
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_interrupt_ends_the_wait_for_another_process(tmp_path, monkeypatch):
    locked, finished = threading.Event(), threading.Event()

    def other():
        with Store(tmp_path).lock("toy", "m_svag", pytest.fail):
            locked.set()
            finished.wait(60)

    monkeypatch.setattr(running, "_run_group", pytest.fail)
    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert locked.wait(30)
        with pytest.raises(KeyboardInterrupt):
            train(job(tmp_path, monitor=WaitingMonitor()))
    finally:
        finished.set()
        thread.join()


def test_runs_work_outside_of_the_main_thread():
    """Where Python handles no signals."""
    found = []
    thread = threading.Thread(target=lambda: found.append(train(job(None))))
    thread.start()
    thread.join(timeout=120)
    assert without_seconds(found[0]) == without_seconds(train(job(None)))


# ---- Kill and resume --------------------------------------------------------------


def start(root, steps, count=1, **options):
    """The runs as a process of their own."""
    command = [sys.executable, "-m", "tests.dissection.toys"]
    return subprocess.Popen(
        [*command, str(root), str(steps), str(count)], cwd=REPOSITORY, **options
    )


def wait_for(process, root, pattern):
    """Returns when a path that matches is there."""
    deadline = time.monotonic() + 300
    while not list(root.glob(pattern)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start_and_kill(root, pattern, steps, count=1):
    """Starts the runs, and kills them when a path that matches is there."""
    process = start(root, steps, count)
    wait_for(process, root, pattern)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("moment", "last_checkpoints"),
    [
        # Before anything of the first checkpoint is written.
        ("toy/m_svag/unfinished/*/group.json", (0, 10)),
        # While one is written.
        (f"{CHECKPOINTS}/30*tmp*", (20, 40)),
    ],
)
def test_killed_run_goes_on_and_ends_with_the_same_record(
    moment, last_checkpoints, tmp_path, begun_at
):
    start_and_kill(tmp_path, moment, steps=200)
    assert not list(tmp_path.glob(RECORDS))
    whole = [p for p in tmp_path.glob(f"{CHECKPOINTS}/*") if p.name.isdigit()]
    last_checkpoint = max((int(path.name) for path in whole), default=0)
    earliest, latest = last_checkpoints
    assert earliest <= last_checkpoint <= latest

    # The rest in this process; it must not begin again.
    record = train(with_steps(tmp_path, 200))
    assert begun_at == [last_checkpoint]
    expected = train(with_steps(None, 200))
    assert without_seconds(record) == without_seconds(expected)
    assert not (tmp_path / "toy" / "m_svag" / "unfinished").exists()


def test_killed_group_goes_on_and_ends_with_the_same_records(tmp_path):
    # Three step sizes as one program, one of which diverges.
    start_and_kill(tmp_path, f"{CHECKPOINTS}/60", steps=100, count=3)
    assert not list(tmp_path.glob(RECORDS))
    method = get_method("m_svag")
    found, expected = (
        complete(runs, method, "toy", toys.group_configs(runs, 3))
        for runs in (
            with_steps(tmp_path, 100, replicas=3),
            with_steps(None, 100, replicas=3),
        )
    )
    assert [record.diverged for record in expected] == [False, False, True]
    assert len(expected[2].evaluations) == 2
    assert [*map(without_seconds, found)] == [*map(without_seconds, expected)]


def test_two_processes_on_one_directory(tmp_path):
    processes = [
        start(tmp_path, 20, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    (record,) = tmp_path.glob(RECORDS)
    # This one finds it.
    found = train(job(tmp_path))
    assert Store(tmp_path).path(found.config) == record
    assert without_seconds(found) == without_seconds(train(job(None)))


# `exec` keeps the process, which is the leader of the terminal's session.
WITH_A_TERMINAL = """
import os, sys
os.login_tty(0)
os.execv(sys.executable, [sys.executable, "-m", "tests.dissection.toys", *sys.argv[1:]])
"""


def test_closing_the_terminal_keeps_what_was_trained(tmp_path):
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_A_TERMINAL, str(tmp_path), "10000000", "1"],
        cwd=REPOSITORY,
        stdin=terminal,
    )
    os.close(terminal)
    wait_for(process, tmp_path, f"{CHECKPOINTS}/[0-9]*0")
    # Its leader gets SIGHUP, and can say nothing any more.
    os.close(controller)
    assert process.wait(timeout=120) != -signal.SIGHUP
    (checkpoint,) = tmp_path.glob(f"{CHECKPOINTS}/*")
    assert checkpoint.name.isdigit()


def test_long_way_to_an_evaluation_is_taken_in_pieces(
    tmp_path, stop_at_first_report, begun_at
):
    settings = dataclasses.replace(SETTINGS, steps=600, evaluation_interval=300)
    runs = job(tmp_path, settings=settings)
    stop_at_first_report(lambda: train(runs))
    record = train(runs)
    assert begun_at == [0, 1]
    whole = train(job(None, settings=settings))
    assert without_seconds(record) == without_seconds(whole)
    assert [line.step for line in record.evaluations] == [0, 300, 600]


def noisy_sgd(learning_rate):
    """SGD on noisy gradients, with random keys and an array without entries."""

    def init(params):
        return jax.random.key(0), jnp.zeros((0, 3)), jnp.bool_(True)

    def update(gradients, state, params=None):
        key, *rest = state
        key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key)
        noisy = jax.tree.map(lambda gradient: gradient * (1 + noise), gradients)
        return noisy, (key, *rest)

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.scale_by_learning_rate(learning_rate),
    )


def test_state_of_any_kind_is_kept(tmp_path, stop_at_first_report, monkeypatch):
    monkeypatch.setitem(METHODS, "noisy", Method("noisy", "noisy", noisy_sgd))
    runs = job(tmp_path)
    stop_at_first_report(lambda: train(runs, "noisy", 0.01))
    record = train(runs, "noisy", 0.01)
    assert without_seconds(record) == without_seconds(train(job(None), "noisy", 0.01))


def test_group_that_is_resumed_has_its_size_again(
    tmp_path, stop_at_first_report, monkeypatch
):
    method = get_method("m_svag")
    runs = job(tmp_path, replicas=3)
    configs = toys.group_configs(runs, 2)
    stop_at_first_report(lambda: complete(runs, method, "toy", configs))
    # One run at a time would be another program, whose rounding differs.
    alone = dataclasses.replace(runs, replicas=1)
    monkeypatch.setattr(running, "replicas_per_program", pytest.fail)
    found = complete(alone, method, "toy", configs)
    whole = complete(job(None, replicas=3), method, "toy", configs)
    assert [*map(without_seconds, found)] == [*map(without_seconds, whole)]


# ---- What the runs of a job share -------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_runs_are_trained_so_many_at_a_time(replicas, monkeypatch):
    method = get_method("m_sgd")
    runs = job(None, replicas=replicas)
    sizes = []
    run_group = running._run_group

    def noted(job, method, title, group):
        sizes.append((len(group.configs), group.size))
        run_group(job, method, title, group)

    monkeypatch.setattr(running, "_run_group", noted)
    monkeypatch.setattr(running, "replicas_per_program", pytest.fail)
    configs = [runs.config(method, 0.1, seed) for seed in range(3)]
    records = complete(runs, method, "toy", configs)
    assert [record.config for record in records] == configs
    assert sizes == {1: [(1, 1)] * 3, 2: [(2, 2), (1, 2)], 5: [(3, 5)]}[replicas]
    for record, config in zip(records, configs, strict=True):
        alone = train(job(None), "m_sgd", 0.1, config.seed)
        for line, other in zip(record.evaluations, alone.evaluations, strict=True):
            assert line.values == pytest.approx(other.values, rel=1e-4)


def test_first_examples_are_trained_on_where_settings_say_so():
    settings = dataclasses.replace(SETTINGS, examples=40, validation_fraction=0.25)
    data = job(None, settings=settings).data
    sizes = [len(part["label"]) for part in data]
    assert sizes == [30, 40, 10]
    whole = toys.load_data(None)
    assert (data.training["label"] == whole.training["label"][:30]).all()
    assert (data.validation["label"] == whole.training["label"][30:40]).all()


def test_progress_is_shown_by_its_monitor():
    console = Console(file=io.StringIO(), width=80)
    train(job(None, monitor=Monitor(console)))
    (line,) = filter(None, console.file.getvalue().splitlines())
    assert line.startswith("m_svag, step size 0.3, seed 0: ")
    assert "1 run, 0 diverged; loss " in line


def other_data(_):
    return jax.tree.map(jnp.zeros_like, toys.load_data(None))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("finished", [True, False])
def test_other_data_are_not_mixed_with_those_of_before(
    finished, seed, tmp_path, stop_at_first_report
):
    runs = job(tmp_path)
    if finished:
        train(runs)
        (path,) = tmp_path.glob(RECORDS)
    else:
        stop_at_first_report(lambda: train(runs))
        (path,) = tmp_path.glob("toy/m_svag/unfinished/*/group.json")
    # The same run as well, although its record is there.
    others = job(
        tmp_path, problem=dataclasses.replace(toys.PROBLEM, load_data=other_data)
    )
    with pytest.raises(UserError) as caught:
        train(others, seed=seed)
    message = str(caught.value)
    assert f"{path} was trained on other data (1300 + 500 examples, " in message
    assert f" now ({fingerprint(other_data(None))})" in message
    train(runs, seed=seed)


# ---- Measurements while a run is trained ------------------------------------------


def measure(params):
    """What JSON has, and what it has not."""
    kernel = params["hidden"]["kernel"]
    return {"norm": float(jnp.linalg.norm(kernel)), "shape": kernel.shape, "no": 1e999}


def diagnosed(root, settings, seed=1, **changes):
    return job(root, settings=settings, diagnosis=Diagnosis(seed, measure), **changes)


LONGER = dataclasses.replace(SETTINGS, steps=60)


def test_diagnosis_is_at_the_first_the_middle_and_the_last_evaluation(tmp_path):
    on_disk, in_memory = (
        train(diagnosed(root, LONGER), seed=1) for root in (tmp_path, None)
    )
    assert list(on_disk.diagnostics) == [0, 30, 60]
    for found in on_disk.diagnostics.values():
        assert found.keys() == {"norm", "shape", "no"}
        assert found["shape"] == [4, 8]
        assert found["no"] is None
    assert len({found["norm"] for found in on_disk.diagnostics.values()}) == 3
    assert in_memory.diagnostics == on_disk.diagnostics
    # It is kept in the record.
    store = Store(tmp_path)
    assert store.find(on_disk.config).diagnostics == on_disk.diagnostics
    # It does not change the run, and other runs do not have it.
    assert without_seconds(on_disk) == without_seconds(
        train(job(None, settings=LONGER), seed=1)
    )
    assert train(diagnosed(None, LONGER), seed=2).diagnostics == {}


def test_diagnosis_is_of_its_run_in_a_group():
    method = get_method("m_svag")
    runs = diagnosed(None, LONGER, seed=5, replicas=3)
    configs = [runs.config(method, 0.3, seed) for seed in (4, 5, 6)]
    others, found, _ = complete(runs, method, "toy", configs)
    assert others.diagnostics == {}
    alone = train(diagnosed(None, LONGER, seed=5), seed=5)
    for step, measured in found.diagnostics.items():
        assert measured["norm"] == pytest.approx(
            alone.diagnostics[step]["norm"], rel=1e-4
        )


def test_diagnosis_survives_kill_and_resume(tmp_path, monkeypatch):
    runs = diagnosed(tmp_path, LONGER)
    calls = []

    def stop_at_the_second(report, step, newest):
        calls.append(step)
        if step == 40:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(f"{REPORT}.__call__", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            train(runs, seed=1)
    record = train(runs, seed=1)
    whole = train(diagnosed(None, LONGER), seed=1)
    assert record.diagnostics == whole.diagnostics
    assert without_seconds(record) == without_seconds(whole)


def test_diagnosis_of_a_run_that_diverges_ends_with_it():
    record = train(diagnosed(None, LONGER), learning_rate=1e30, seed=1)
    assert record.diverged
    assert list(record.diagnostics) == [0]


def test_diagnosis_that_json_does_not_have_is_an_error():
    runs = job(None, diagnosis=Diagnosis(0, lambda params: {"all": params}))
    with pytest.raises(TypeError, match="`diagnosis` must be JSON"):
        train(runs)


# ---- Disks ------------------------------------------------------------------------


def test_full_disk_at_a_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    runs = job(tmp_path, checkpoint_seconds=0.0)
    room = iter([10**12, 0])
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=next(room)))
        with pytest.raises(OSError, match="No space left on device"):
            train(runs)
    (checkpoint,) = tmp_path.glob(f"{CHECKPOINTS}/*")
    assert checkpoint.name == "1"

    # A disk that is filled by another program meanwhile.
    def fill(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", fill)
        with pytest.raises(OSError, match="No space left on device"):
            train(runs)
    train(runs)


def test_nothing_is_written_for_runs_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = job(None, checkpoint_seconds=0.0)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", pytest.fail)
        record = train(runs)
    assert not list(tmp_path.iterdir())
    on_disk = train(job(tmp_path / "runs", checkpoint_seconds=0.0))
    assert without_seconds(record) == without_seconds(on_disk)
    assert record.config == on_disk.config
