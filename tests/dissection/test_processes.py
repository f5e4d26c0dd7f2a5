"""Several processes train what one trains, and lose little when one of them dies."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from dissect_optax.dissection import UserError, complete, get_method, start_if
from dissect_optax.dissection import _processes as processes
from experiments import launch as launching
from tests.dissection.processes import configs_of
from tests.dissection.toys import SETTINGS, job
from tests.virtual_devices import eight_devices

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.dissection.processes"]
STEPS, RUNS = 40, 2


def launch(root, count, *options):
    """Launches the small problem; returns the exit status."""
    return launching.launch(
        [*COMMAND, str(root / "runs"), *options],
        processes=count,
        devices=1,
        logs=root / "logs",
        step_deadline=300.0,
        grace=60.0,
        resume="the same",
    )


def when_it_trains(root, index, action):
    """Calls the action with the process that has this number, once it trains."""
    done = {}

    def watch():
        limit = time.monotonic() + 300
        while time.monotonic() < limit:
            time.sleep(0.05)
            try:
                _, step = (root / f"logs/process{index}.pulse").read_text().split()
            except (OSError, ValueError):
                continue
            if int(step) >= 12:
                done["at"] = time.monotonic()
                action(pid_of(root, index))
                return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, done


def pid_of(root, index):
    """The process whose command line has this directory and number."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(root / "runs") in words and words[-3:-1] == ["--process-id", str(index)]:
            return int(path.parent.name)
    raise LookupError(index)


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def unfinished_steps(root):
    found = root.glob("runs/toy/m_svag/unfinished/*/checkpoints/[0-9]*")
    return [int(path.name) for path in found]


@pytest.fixture(scope="module")
def expected():
    """The losses of the runs on one device."""
    return losses_of(None)


def losses_of(root):
    """The losses of the runs here; those that are not finished are trained."""
    runs = job(root, settings=dataclasses.replace(SETTINGS, steps=STEPS), replicas=RUNS)
    with jax.numpy_rank_promotion("raise"):
        records = complete(runs, get_method("m_svag"), "toy", configs_of(runs, RUNS))
    return [record.curve("training_loss") for record in records]


def assert_equal(found, expected):
    for losses, wanted in zip(found, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-4)


OPTIONS = ("--steps", str(STEPS), "--count", str(RUNS))


def test_a_killed_run_of_four_processes_goes_on_with_two(tmp_path, expected, capfd):
    thread, killed = when_it_trains(tmp_path, 1, kill)
    mesh = ("--mesh", "replica=2,data=2", "--wait", "0.3")
    status = launch(tmp_path, 4, *OPTIONS, *mesh)
    seconds = time.monotonic() - killed["at"]
    thread.join()
    assert status == 1
    assert seconds < 20
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search("process 1 was killed by SIGKILL at step [1-9][0-9]*; the", line)
    (step,) = unfinished_steps(tmp_path)
    assert 1 <= step < STEPS
    assert launch(tmp_path, 2, *OPTIONS) == 0
    assert f"begins at {step}\n" in capfd.readouterr().out
    # Read, not trained again.
    assert_equal(losses_of(tmp_path / "runs"), expected)
    assert not unfinished_steps(tmp_path)


def test_a_run_without_its_coordinator_goes_on_with_one_and_eight_devices(
    tmp_path, expected, capfd
):
    thread, killed = when_it_trains(tmp_path, 0, kill)
    assert launch(tmp_path, 2, *OPTIONS, "--wait", "0.3") == 1
    seconds = time.monotonic() - killed["at"]
    thread.join()
    assert seconds < 20
    (line,) = capfd.readouterr().err.splitlines()
    assert "process 0 was killed by SIGKILL at step" in line
    (step,) = unfinished_steps(tmp_path)
    shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    assert_equal(losses_of(tmp_path / "copy"), expected)
    done = subprocess.run(
        [*COMMAND, str(tmp_path / "runs"), *OPTIONS],
        cwd=REPOSITORY,
        env=eight_devices(),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert f"begins at {step}\n" in done.stdout
    assert_equal(losses_of(tmp_path / "runs"), expected)


def test_a_signal_to_the_parent_makes_a_checkpoint(tmp_path, expected, capfd):
    thread, _ = when_it_trains(
        tmp_path, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert launch(tmp_path, 2, *OPTIONS, "--wait", "0.3") == launching.INTERRUPTED
    thread.join()
    output = capfd.readouterr()
    assert output.err.startswith("Interrupted. The same command goes on")
    assert "Interrupted. The same goes on." in output.out
    for index in range(2):
        log = (tmp_path / f"logs/process{index}.log").read_text()
        assert log.count("Stopping in a moment") == 1
        assert "Traceback" not in log
    assert unfinished_steps(tmp_path)
    assert_equal(losses_of(tmp_path / "runs"), expected)


# ---- One process ------------------------------------------------------------------


def test_arguments_of_processes_without_distributed_are_a_sentence():
    start_if(False)
    with pytest.raises(UserError, match="are for `--distributed`; give it, too"):
        start_if(False, "localhost:1234")


@pytest.mark.parametrize(
    "arguments",
    [("localhost:1234", None, 0), (None, 2, 0), ("localhost:1234", 2, None)],
)
def test_half_of_the_arguments_are_a_sentence(arguments):
    with pytest.raises(UserError, match="coordinator, number of processes and process"):
        processes.start(*arguments)


def test_a_late_start_is_a_sentence():
    jax.devices()
    with pytest.raises(UserError, match="The processes could not be connected"):
        processes.start("localhost:1234", 1, 0)


def test_one_process_agrees_with_itself():
    assert processes.from_primary(lambda: 3) == 3
    assert processes.on_every_process(lambda: 4) == 4
    assert processes.largest(0.1, 2) == [0.1, 2]
    with pytest.raises(ZeroDivisionError):
        processes.on_every_process(lambda: 1 // 0)


@pytest.mark.parametrize(
    "error", [UserError("a"), OSError(28, "No space", "file"), KeyboardInterrupt()]
)
def test_errors_are_the_same_in_every_process(error):
    content = processes._pickled_error(error)
    _, found = processes.pickle.loads(content)
    assert type(found) is type(error)
    assert str(found) == str(error)


def test_an_error_that_cannot_be_pickled_keeps_its_sentence():
    class Local(Exception):
        pass

    content = processes._pickled_error(Local("the sentence"))
    _, found = processes.pickle.loads(content)
    assert type(found) is RuntimeError
    assert str(found) == "the sentence."
