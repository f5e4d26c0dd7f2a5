"""`launch` starts processes, watches them, and says in one line what became of them.

Most tests launch scripts that only show a pulse; the last ones train.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import launch as launching

REPOSITORY = Path(__file__).parents[2]
# Counts steps; what `process` does at step 5 is up to the test.
SCRIPT = """
import os, signal, sys, time
index = int(sys.argv[sys.argv.index("--process-id") + 1])
def stop(*_):
    print("stopping", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
for step in range(1, 1000):
    pulse = os.environ["DISSECT_OPTAX_PULSE"]
    open(pulse + ".draft", "w").write(f"{step} {step}")
    os.replace(pulse + ".draft", pulse)
    print("step", step, flush=True)
    if step == 5:
        AT_FIVE
    time.sleep(0.05)
"""


def launch(script, tmp_path, processes=3, step_deadline=60.0, grace=20.0):
    """Launches the script; returns exit status and seconds."""
    begun = time.monotonic()
    status = launching.launch(
        [sys.executable, "-c", script],
        processes=processes,
        devices=1,
        logs=tmp_path / "logs",
        step_deadline=step_deadline,
        grace=grace,
        resume="python -m experiments launch -- train digits",
    )
    return status, time.monotonic() - begun


def script(at_five="pass"):
    return SCRIPT.replace("AT_FIVE", at_five)


def processes_of(tmp_path):
    """Which of the launched processes still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(tmp_path).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [number for number in found if number != os.getpid()]


@pytest.mark.parametrize(
    ("at_five", "fate"),
    [
        ("if index == 1: os.kill(os.getpid(), 9)", "process 1 was killed by SIGKILL"),
        ("if index == 0: os.kill(os.getpid(), 9)", "process 0 was killed by SIGKILL"),
        ("if index == 2: sys.exit(3)", "process 2 ended with status 3"),
        # What the death of one does to the others is not the cause.
        (
            "os.kill(os.getpid(), 9) if index == 2 else os.abort()",
            "process 2 was killed by SIGKILL",
        ),
        (
            "os.kill(os.getpid(), 9) if index == 1 else sys.exit(1)",
            "process 1 was killed by SIGKILL",
        ),
        # One that waits for a dead process does not react to SIGTERM.
        (
            "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            " sys.exit(4) if index == 1 else None",
            "process 1 ended with status 4",
        ),
    ],
)
def test_a_death_ends_the_others_and_is_one_line(at_five, fate, tmp_path, capfd):
    status, seconds = launch(script(at_five), tmp_path)
    assert status == 1
    assert seconds < 20
    (line,) = capfd.readouterr().err.splitlines()
    assert f"launch: {fate} at step 5;" in line
    assert line.endswith("with: python -m experiments launch -- train digits")
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("at_five", ["time.sleep(100)", "os.kill(os.getpid(), 19)"])
def test_a_process_that_hangs_is_found_by_its_deadline(at_five, tmp_path, capfd):
    # The others wait for it, a little further.
    waiting = f"""
        if index == 1:
            {at_five}
        open(pulse + ".draft", "w").write("6 5")
        os.replace(pulse + ".draft", pulse)
        time.sleep(100)
    """.strip()
    status, seconds = launch(script(waiting), tmp_path, step_deadline=2.0)
    assert status == 1
    assert seconds < 20
    (line,) = capfd.readouterr().err.splitlines()
    assert "process 1 showed no pulse for 2 seconds, after step 5; all" in line
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_once(number, tmp_path, capfd):
    both = script().replace("signal.SIGTERM, stop", f"{int(number)}, stop")

    def send():
        while not (tmp_path / "logs/process2.pulse").exists():
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    status, seconds = launch(both, tmp_path)
    thread.join()
    assert status == launching.INTERRUPTED
    assert seconds < 20
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Interrupted. The same command goes on from")
    for index in range(3):
        log = (tmp_path / f"logs/process{index}.log").read_text()
        assert log.count("stopping") == 1


def test_a_signal_to_one_process_may_stop_all(tmp_path, capfd):
    stopping = script("time.sleep(0 if index == 1 else 2); sys.exit(130)")
    status, _ = launch(stopping, tmp_path)
    assert status == launching.INTERRUPTED
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Interrupted. The same command goes on from")


def test_processes_that_ignore_a_signal_have_a_limit(tmp_path):
    ignoring = script().replace(
        "signal.SIGTERM, stop", "signal.SIGTERM, signal.SIG_IGN"
    )
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    status, seconds = launch(ignoring, tmp_path, grace=1.0)
    assert status == launching.INTERRUPTED
    assert seconds < 20
    assert processes_of(tmp_path) == []


def test_process_0_is_shown_and_others_are_logged(tmp_path, capfd):
    ending = script("print('done by', index); sys.exit(0)")
    status, _ = launch(ending, tmp_path, processes=2)
    assert status == 0
    output = capfd.readouterr()
    assert output.out.splitlines()[-1] == "done by 0"
    assert output.err == ""
    assert "done by 1" in (tmp_path / "logs/process1.log").read_text()


def test_a_mistake_in_the_command_is_no_death(tmp_path, capfd):
    status, _ = launch(script("print('no problem digist'); sys.exit(2)"), tmp_path)
    assert status == 2
    output = capfd.readouterr()
    assert "no problem digist" in output.out
    assert output.err == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--processes", "0", "--", "train"], "`--processes` must be at least 1"),
        (["--step-deadline", "0", "--", "train"], "`--step-deadline` must be positive"),
        (["--devices-per-process", "-1", "--", "train"], "must be at least 1"),
    ],
)
def test_wrong_options_are_a_sentence(arguments, sentence, capsys):
    assert launching.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_without_a_command_nothing_is_launched(capsys):
    with pytest.raises(SystemExit) as caught:
        launching.main(["--processes", "2"])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


# ---- Processes that train ---------------------------------------------------------


def test_two_processes_train_the_digits_as_one_does(tmp_path):
    train = ["train", "digits", "--optimizer", "m_svag", "--learning-rate", "0.3"]
    train += ["--steps", "4", "--evaluation-interval", "2", "--checkpoint-seconds", "0"]

    def run(*before, root):
        done = subprocess.run(
            [sys.executable, "-m", "experiments", *before, *train, "--runs-dir", root],
            cwd=REPOSITORY,
            env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        # A record is written once, and no checkpoint is left.
        (path,) = Path(root).glob("digits/m_svag/**/*.json")
        return done.stdout, json.loads(path.read_text())

    logs = str(tmp_path / "logs")
    shown, two = run("launch", "--logs", logs, "--", root=str(tmp_path / "two"))
    _, one = run(root=str(tmp_path / "one"))
    assert shown.count("M-SVAG, step size 0.3, seed 0: training loss") == 1
    assert "Record:" not in (tmp_path / "logs/process1.log").read_text()
    assert two["config"] == one["config"]
    ran_on = two["environment"]
    assert (ran_on["processes"], ran_on["mesh"]) == (2, {"replica": 1, "data": 2})
    for line, expected in zip(two["evaluations"], one["evaluations"], strict=True):
        for name in expected.keys() - {"seconds"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-4), name
