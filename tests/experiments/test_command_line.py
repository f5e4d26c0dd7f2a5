"""Every command at smoke size, what it says about mistakes, and kill and resume."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shlex
import shutil
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
from matplotlib.image import imread

from experiments import commands, running
from experiments.command_line import COMMANDS, main
from experiments.data import fingerprint
from experiments.evaluation import evaluate
from experiments.methods import FOUR_METHODS, METHODS, Method
from experiments.problems import get_problem
from experiments.records import Store, config_from_json
from experiments.studies import convergence
from experiments.tuning import step_size

TRAIN = ["train", "digits", "--optimizer", "m_svag"]
CHECKPOINTS = "digits/m_svag/unfinished/*/checkpoints"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory):
    """Records of the main job at smoke size."""
    runs = tmp_path_factory.mktemp("runs")
    # As in every test, so that nothing is compiled twice.
    with jax.numpy_rank_promotion("raise"):
        assert main(["--smoke", "--runs-dir", str(runs)]) == 0
    return runs


def lines_of(directory):
    """The evaluations in a record directory, less the seconds."""
    text = (directory / "evaluations.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_main_job_leaves_records_summary_and_figure(smoke_runs):
    summary = json.loads((smoke_runs / "digits" / "summary_smoke.json").read_text())
    assert list(summary["methods"]) == list(FOUR_METHODS)
    for name, method in summary["methods"].items():
        assert method["seeds"] == [1, 2]
        (directory,) = smoke_runs.glob(
            f"digits/{name}/rate{method['step_size']:g}_seed1_*"
        )
        evaluations = lines_of(directory)
        assert [line["step"] for line in evaluations] == [0, 10, 20]
        assert method["test_accuracies"][0] == evaluations[-1]["test_accuracy"]
        assert method["environment"]["jax"] == jax.__version__
    assert len(summary["effects_of_the_sign"]) == 2
    assert len(summary["effects_of_variance_adaptation"]) == 2
    pixels = imread(smoke_runs / "figures" / "figure_3_digits_smoke.png")
    assert pixels.std() > 0.05
    assert not list(smoke_runs.glob("digits/*/unfinished/*"))


def test_main_job_runs_nothing_twice(smoke_runs, monkeypatch, capsys):
    monkeypatch.setattr("experiments.running._run_group", pytest.fail)
    assert main(["--smoke", "--runs-dir", str(smoke_runs)]) == 0
    printed = capsys.readouterr().out
    for label in ("M-SGD", "M-SSD", "M-SVAG", "ADAM", "ADAM − M-SVAG"):
        assert f"| {label} " in printed
    assert str(smoke_runs / "figures" / "figure_3_digits_smoke.png") in printed


def test_table_and_figure_come_from_records(smoke_runs, monkeypatch, capsys):
    monkeypatch.setattr("experiments.running._run_group", pytest.fail)
    options = ["--smoke", "--runs-dir", str(smoke_runs)]
    assert main(["table", *options]) == 0
    assert "ADAM − M-SSD" in capsys.readouterr().out
    assert main(["figure", "3", *options]) == 0
    assert "figure_3_digits_smoke.png" in capsys.readouterr().out


def test_tune_says_what_won(smoke_runs, capsys):
    options = ["--smoke", "--runs-dir", str(smoke_runs)]
    assert main(["tune", "digits", "--optimizers", "adam", "m_sgd", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["ADAM", "M-SGD"]
    assert all("largest stable" in line for line in printed)


def test_train_gives_the_curve_of_the_group(smoke_runs, tmp_path, capsys):
    summary = json.loads((smoke_runs / "digits" / "summary_smoke.json").read_text())
    rate = summary["methods"]["adam"]["step_size"]
    command = ["train", "digits", "--optimizer", "adam", "--seed", "2", "--smoke"]
    command += ["--learning-rate", str(rate), "--runs-dir", str(tmp_path)]
    assert main(command) == 0
    name = f"digits/adam/rate{rate:g}_seed2_*"
    (alone,), (in_group,) = tmp_path.glob(name), smoke_runs.glob(name)
    assert str(alone) in capsys.readouterr().out
    for line, other in zip(lines_of(alone), lines_of(in_group), strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if name.startswith("validation"):
                assert value is None  # There is no validation set.
            else:
                assert value == pytest.approx(other[name], rel=1e-4)


def test_any_optax_optimizer_and_a_diverging_run(tmp_path, capsys):
    command = ["train", "digits", "--optimizer", "optax.sgd", "--smoke"]
    command += ["--learning-rate", "1e30", "--runs-dir", str(tmp_path)]
    assert main(command) == 0
    assert "diverged before step 10" in capsys.readouterr().out
    (record,) = tmp_path.glob("digits/optax.sgd/rate*")
    assert [line["training_loss"] is None for line in lines_of(record)] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'?"),
        (["tune", "digist"], "no problem 'digist'. Did you mean 'digits'?"),
        (["table", "digits"], "python -m experiments reproduce digits"),
        (
            ["figure", "99"],
            "no command for Figure 99. Known: 1, 2, 3, 4, 5, 6, 7.",
        ),
        (
            ["train", "digits", "--optimizer", "msvag", "--learning-rate", "1"],
            "no optimizer 'msvag'. Did you mean 'm_svag'?",
        ),
        (
            ["train", "digits", "--optimizer", "optax.adm", "--learning-rate", "1"],
            "Optax has no 'optax.adm'. Did you mean 'optax.adam",
        ),
        (["mnits"], "no command 'mnits'. Did you mean 'reproduce mnist'?"),
        (
            ["train", "digits", "--optimizer", "M-SVAG", "--learning-rate", "1"],
            "no optimizer 'M-SVAG'. Did you mean 'm_svag'?",
        ),
        (
            ["tune", "digits", "--optimizers", "optax.contrib.muonn"],
            "Did you mean 'optax.contrib.muon'?",
        ),
        *(
            (["figure", "1", *options], "Figure 1 shows no test problem")
            for options in (["--problems", "digits"], ["--steps", "7"])
        ),
        (["figure", "3", "--problems"], "`--problems` must be .* got nothing"),
        (["tune", "digits", "--optimizers"], "`--optimizers` must be .* got nothing"),
        (["table", "--optimizers", "adam", "adam"], "different names, got adam adam"),
        (["curves", "digits", "--checkpoint-seconds", "nan"], "not be negative"),
        (
            ["train", "cifar100", "--optimizer", "optax.rprop", "--learning-rate", "1"],
            "'optax.rprop' takes no schedule of the learning rate",
        ),
        *(
            (
                ["train", "digits", "--optimizer", path, "--learning-rate", "1"],
                f"'{path}' is no optimizer",
            )
            for path in (
                "optax.losses",
                "optax.apply_updates",
                "optax.linear_schedule",
                # Transformations whose first parameter is something else.
                "optax.clip",
                "optax.scale",
                "optax.trace",
                # It asks for the loss at other points.
                "optax.lbfgs",
            )
        ),
        *(
            ([*TRAIN, "--learning-rate", rate], f"positive number .* got {rate}")
            for rate in ("0", "-1", "nan", "inf", "1e-60")
        ),
        *(
            ([*TRAIN, "--learning-rate", "1", "--seed", seed], f"`--seed` .*got {seed}")
            for seed in ("-1", str(2**32))
        ),
        *(
            ([*TRAIN, "--learning-rate", "1", *steps], "--evaluation-interval")
            for steps in (["--steps", "30"], ["--evaluation-interval", "0"])
        ),
        *(
            ([*TRAIN, "--learning-rate", "1", "--steps", n], f"at least 1, got {n}")
            for n in ("0", "-20")
        ),
        (
            ["tune", "digits", "--tuning-steps", "30"],
            "`--tuning-steps` must be a multiple of .* got 30 and 20",
        ),
        (["curves", "digits"], "holds no record of .* on digits"),
        *(
            (["reproduce", "digits", "--seeds", seeds], f"`--seeds` .* got {seeds}")
            for seeds in ("0", "-3")
        ),
    ],
)
def test_mistake_is_answered_in_a_sentence(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)  # Where there are no records.
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err)
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


def test_runs_dir_that_is_a_file_is_named(tmp_path, capsys):
    runs = tmp_path / "runs"
    runs.touch()
    options = ["--smoke", "--runs-dir", str(runs)]
    for command in ([*TRAIN, "--learning-rate", "1"], ["quadratic"], ["figure", "5"]):
        assert main([*command, *options]) == 2
        printed = capsys.readouterr().err
        assert str(runs) in printed
        assert "Are --runs-dir and --data-dir directories" in printed


def test_full_disk_at_a_checkpoint_leaves_the_one_before(tmp_path, monkeypatch, capsys):
    command = [*TRAIN, "--learning-rate", "0.3", "--steps", "60", "--runs-dir"]
    command += [str(tmp_path), "--checkpoint-seconds", "0"]
    room = iter([10**12, 0])
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=next(room)))
        assert main(command) == 2
    assert "No space left on device" in capsys.readouterr().err
    (checkpoint,) = tmp_path.glob("digits/m_svag/unfinished/*/checkpoints/*")
    assert checkpoint.name == "1"

    # A disk that is filled by another program meanwhile.
    def fill(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", fill)
        assert main(command) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert main(command) == 0


def test_full_disk_is_named(smoke_runs, monkeypatch, capsys):
    def fill(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fill)
    assert main(["--smoke", "--runs-dir", str(smoke_runs)]) == 2
    summary = smoke_runs / "digits" / "summary_smoke.json"
    assert f"No space left on device: {summary}." in capsys.readouterr().err


def test_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["table", "--smok"])
    assert stopped.value.code == 2
    assert "--smoke" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[*TRAIN, "--learning-rate", "1"], ["curves", "digits"]]
)
def test_option_of_tuning_is_refused_where_nothing_is_tuned(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--tuning-steps", "20"])
    assert stopped.value.code == 2
    assert "Unrecognized" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"[│•] +{name} ", printed) for name in COMMANDS)


def test_interrupt_loses_nothing_and_says_how_to_go_on(
    tmp_path, interrupt_at_first_news, monkeypatch, capsys
):
    command = ["train", "digits", "--optimizer", "m_svag", "--learning-rate", "0.3"]
    command += ["--smoke", "--runs-dir", str(tmp_path)]
    begun_at = []
    interrupt_at_first_news(command)
    said = capsys.readouterr().err
    assert "Stopping in a moment" in said
    assert "The same command goes on" in said
    assert said.rstrip().endswith(shlex.join(["python", "-m", "experiments", *command]))

    monkeypatch.setattr(
        "experiments.progress.GroupReport.begin",
        lambda _, step, newest: begun_at.append(step),
    )
    assert main(command) == 0
    assert begun_at == [1]


def interrupted_by(function):
    """The function, with a Ctrl-C that arrives while it works."""

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return function(*arguments)

    return interrupted


def test_interrupt_before_the_first_step_ends_the_run(tmp_path, monkeypatch, capsys):
    command = [*TRAIN, "--learning-rate", "0.3", "--smoke", "--runs-dir", str(tmp_path)]
    monkeypatch.setattr("experiments.running._begin", interrupted_by(running._begin))
    monkeypatch.setattr("experiments.running.advance", pytest.fail)
    assert main(command) == 130
    assert "The same command goes on" in capsys.readouterr().err


def test_interrupt_after_the_last_step_keeps_the_record(tmp_path, monkeypatch):
    command = [*TRAIN, "--learning-rate", "0.3", "--smoke", "--runs-dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(
            "experiments.running.environment", interrupted_by(running.environment)
        )
        assert main(command) == 130
    monkeypatch.setattr("experiments.running._run_group", pytest.fail)
    assert main(command) == 0


@pytest.mark.parametrize(("evaluation", "checkpoints"), [(0, []), (1, ["10"])])
def test_interrupt_ends_an_evaluation(evaluation, checkpoints, tmp_path, monkeypatch):
    command = [*TRAIN, "--learning-rate", "0.3", "--smoke", "--runs-dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    runs = tmp_path / "runs"
    evaluations = itertools.count()

    def interrupted(*arguments, stop):
        if next(evaluations) == evaluation:
            signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments, stop=stop)

    with monkeypatch.context() as patch:
        patch.setattr("experiments.running.evaluate", interrupted)
        assert main([*command, str(runs)]) == 130
    assert [path.name for path in runs.glob(f"{CHECKPOINTS}/*")] == checkpoints
    assert main([*command, str(runs)]) == 0
    whole, record = (
        next(folder.glob("digits/m_svag/rate*"))
        for folder in (tmp_path / "whole", runs)
    )
    assert lines_of(record) == lines_of(whole)
    assert [line["step"] for line in lines_of(record)] == [0, 10, 20]


def test_interrupt_ends_the_wait_for_another_process(tmp_path, monkeypatch, capsys):
    command = [*TRAIN, "--learning-rate", "0.3", "--smoke", "--runs-dir", str(tmp_path)]
    locked, finished = threading.Event(), threading.Event()

    def other():
        with Store(tmp_path).lock("digits", "m_svag", pytest.fail):
            locked.set()
            finished.wait(60)

    def wait(*_):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr("experiments.progress.Monitor.say", wait)
    monkeypatch.setattr("experiments.running._run_group", pytest.fail)
    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert locked.wait(30)
        assert main(command) == 130
    finally:
        finished.set()
        thread.join()
    assert "The same command goes on" in capsys.readouterr().err


def test_interrupt_ends_a_study(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "experiments.studies.convergence.make_problem",
        interrupted_by(convergence.make_problem),
    )
    assert main(["convergence", "--smoke", "--runs-dir", str(tmp_path)]) == 130
    assert not list(tmp_path.glob("studies/convergence*"))


# ---- Kill and resume --------------------------------------------------------------


def start(command):
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", *command],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_and_stop(command, runs, pattern, number):
    """Starts the command, and sends a signal when a path that matches is there."""
    process = start(command)
    deadline = time.monotonic() + 300
    while not list(runs.glob(pattern)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def start_and_kill(command, runs, pattern):
    """Starts the command, and kills it when a path that matches is there."""
    status, _ = start_and_stop(command, runs, pattern, signal.SIGKILL)
    assert status == -signal.SIGKILL


# What it has measured, and its arrays.
MEASURED, ARRAYS = "measured/metadata", "state/ocdbt.process_0/d/*"


@pytest.mark.parametrize(
    ("moment", "last_checkpoints"),
    [
        # Before anything of the first checkpoint is written.
        ("digits/m_svag/unfinished/*/group.json", (0, 20)),
        # While one is written.
        (f"{CHECKPOINTS}/60*tmp*", (40, 80)),
        # While steps are taken, or the next one is written.
        (f"{CHECKPOINTS}/200", (200, 240)),
    ],
)
def test_killed_run_goes_on_and_ends_with_the_same_record(
    moment, last_checkpoints, tmp_path, monkeypatch
):
    command = ["train", "digits", "--optimizer", "m_svag", "--learning-rate", "0.3"]
    command += ["--steps", "400"]
    reference, runs = tmp_path / "reference", tmp_path / "runs"
    options = ["--runs-dir", str(runs), "--checkpoint-seconds", "0"]
    assert main([*command, "--runs-dir", str(reference)]) == 0
    start_and_kill([*command, *options], runs, moment)
    assert not list(runs.glob("digits/m_svag/rate*"))
    whole = [p for p in runs.glob(f"{CHECKPOINTS}/*") if p.name.isdigit()]
    last_checkpoint = max((int(path.name) for path in whole), default=0)
    earliest, latest = last_checkpoints
    assert earliest <= last_checkpoint <= latest

    # The rest in this process; it must not begin again.
    first_steps = []
    monkeypatch.setattr(
        "experiments.progress.GroupReport.begin",
        lambda _, step, newest: first_steps.append(step),
    )
    assert main([*command, "--runs-dir", str(runs)]) == 0
    assert first_steps == [last_checkpoint]
    (record,), (expected,) = (
        folder.glob("digits/m_svag/rate*") for folder in (runs, reference)
    )
    assert lines_of(record) == lines_of(expected)
    assert not (runs / "digits" / "m_svag" / "unfinished").exists()


def test_killed_group_goes_on_and_ends_with_the_same_records(tmp_path):
    # Ten step sizes as one program, some of which diverge, and then the next group.
    command = ["tune", "digits", "--optimizers", "m_svag", "--steps", "100"]
    reference, runs = tmp_path / "reference", tmp_path / "runs"
    options = ["--runs-dir", str(runs), "--checkpoint-seconds", "0"]
    assert main([*command, "--runs-dir", str(reference)]) == 0
    start_and_kill([*command, *options], runs, f"{CHECKPOINTS}/60")
    assert not list(runs.glob("digits/m_svag/rate*"))
    assert main([*command, "--runs-dir", str(runs)]) == 0
    records, expected = (
        {path.name: lines_of(path) for path in folder.glob("digits/m_svag/rate*")}
        for folder in (runs, reference)
    )
    assert len(expected) >= 10
    assert any(lines[-1]["training_loss"] is None for lines in expected.values())
    assert records == expected


def test_ctrl_c_ends_a_process_that_says_how_to_go_on(tmp_path):
    command = [*TRAIN, "--learning-rate", "0.3", "--steps", "1000000", "--runs-dir"]
    command += [str(tmp_path), "--checkpoint-seconds", "0"]
    status, errors = start_and_stop(
        command, tmp_path, f"{CHECKPOINTS}/*", signal.SIGINT
    )
    assert status == 130
    assert "Stopping in a moment." in errors
    assert "The same command goes on" in errors
    assert shlex.join(command) in errors


def test_two_processes_on_one_directory(tmp_path):
    command = [*TRAIN, "--learning-rate", "0.3", "--smoke", "--runs-dir"]
    processes = [start([*command, str(tmp_path / "both")]) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    # One of them trained, the other found the record.
    assert sorted(["M-SVAG" in text for text in errors]) == [False, True]
    assert main([*command, str(tmp_path / "alone")]) == 0
    (found,), (expected,) = (
        list((tmp_path / name).glob("digits/m_svag/rate*"))
        for name in ("both", "alone")
    )
    assert lines_of(found) == lines_of(expected)


def unfinished_run(command, runs, monkeypatch):
    """The checkpoint that a run leaves which is stopped after its last step."""
    with monkeypatch.context() as patch:
        patch.setattr("experiments.checkpoints.remove", lambda *_: None)
        assert main([*command, "--checkpoint-seconds", "0"]) == 0
    (record,) = runs.glob("digits/*/rate*")
    shutil.rmtree(record)
    (checkpoint,) = runs.glob("digits/*/unfinished/*")
    return checkpoint


def cut_off(content):
    return content[:3]


def one_bit_changed(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]


def replaced(old, new):
    return lambda content: re.sub(old, new, content, count=1)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("group.json", cut_off),
        ("group.json", replaced(rb'"size": \d+', b'"size": null')),
        ("group.json", replaced(rb"(?s)\[.*\]", b"[]")),
        (f"checkpoints/20/{MEASURED}", cut_off),
        (f"checkpoints/20/{MEASURED}", replaced(b"seconds", b"sexonds")),
        (f"checkpoints/20/{MEASURED}", replaced(rb'_loss": [\d.]+', b'_loss": "x"')),
        (f"checkpoints/20/{ARRAYS}", cut_off),
        (f"checkpoints/20/{ARRAYS}", one_bit_changed),
    ],
)
def test_damaged_checkpoint_is_named(file, damage, tmp_path, monkeypatch, capsys):
    command = [*TRAIN, "--learning-rate", "0.3", "--smoke", "--runs-dir"]
    command.append(str(tmp_path))
    checkpoint = unfinished_run(command, tmp_path, monkeypatch)
    # Orbax keeps its own small files in the same folder.
    damaged = max(checkpoint.glob(file), key=lambda path: path.stat().st_size)
    content = damaged.read_bytes()
    assert damage(content) != content
    damaged.write_bytes(damage(content))
    capsys.readouterr()
    assert main(command) == 2
    message = capsys.readouterr().err.strip()
    assert f"The checkpoint in {checkpoint} cannot be read: " in message
    assert message.endswith("Remove that directory to begin these runs again.")
    assert "\n" not in message
    shutil.rmtree(checkpoint)
    assert main(command) == 0


def test_run_that_is_resumed_after_its_last_step_has_news(
    tmp_path, monkeypatch, capsys
):
    command = [*TRAIN, "--learning-rate", "0.3", "--smoke", "--runs-dir"]
    command.append(str(tmp_path))
    unfinished_run(command, tmp_path, monkeypatch)
    capsys.readouterr()
    assert main(command) == 0
    assert "1 run, 0 diverged; loss" in capsys.readouterr().err


def test_checkpoint_of_another_optimizer_is_named(tmp_path, monkeypatch, capsys):
    command = [*TRAIN, "--learning-rate", "0.3", "--smoke", "--runs-dir"]
    command.append(str(tmp_path))
    unfinished_run(command, tmp_path, monkeypatch)
    # As if its state had changed with a new version of the library.
    monkeypatch.setitem(
        METHODS, "m_svag", dataclasses.replace(METHODS["m_sgd"], name="m_svag")
    )
    assert main(command) == 2
    assert "its arrays are not those of this optimizer" in capsys.readouterr().err


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


def test_state_of_any_kind_is_kept(tmp_path, interrupt_at_first_news, monkeypatch):
    monkeypatch.setitem(METHODS, "noisy", Method("noisy", "noisy", noisy_sgd))
    command = ["train", "digits", "--optimizer", "noisy", "--learning-rate", "0.01"]
    command += ["--smoke", "--runs-dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    interrupt_at_first_news([*command, str(tmp_path / "halves")])
    assert main([*command, str(tmp_path / "halves")]) == 0
    whole, halves = (
        next((tmp_path / part).glob("digits/*/rate*")) for part in ("whole", "halves")
    )
    assert lines_of(halves) == lines_of(whole)


@pytest.mark.parametrize("finished", [True, False])
def test_other_data_are_not_mixed_with_those_of_before(
    finished, tmp_path, monkeypatch, capsys
):
    command = [*TRAIN, "--learning-rate", "0.3", "--smoke", "--runs-dir"]
    command.append(str(tmp_path))
    if finished:
        assert main(command) == 0
        (directory,) = tmp_path.glob("digits/m_svag/rate*")
    else:
        directory = unfinished_run(command, tmp_path, monkeypatch)
    capsys.readouterr()
    other_images = jax.tree.map(jnp.zeros_like, get_problem("digits").load_data(None))
    with monkeypatch.context() as patch:
        patch.setattr("experiments.running._whole_dataset", lambda *_: other_images)
        patch.setattr(
            "experiments.running._fingerprint", lambda *_: fingerprint(other_images)
        )
        assert main([*command, "--seed", "1"]) == 2
    message = capsys.readouterr().err
    assert f"{directory} was trained on other data (1297 + 500 images, " in message
    assert f" now ({fingerprint(other_images)})" in message
    assert main([*command, "--seed", "1"]) == 0


def test_a_problem_in_place_of_a_command_is_told_apart(capsys):
    assert main(["digits"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "Did you mean `python -m experiments reproduce digits`?" in message


def test_shorter_runs_are_kept_apart(tmp_path, capsys):
    options = ["--optimizers", "adam", "--runs-dir", str(tmp_path), "--seeds", "1"]
    options += ["--steps", "40", "--tuning-steps", "20"]
    assert main(["reproduce", "digits", *options]) == 0
    suffix = "_40_steps_tuned_by_20_steps"
    path = tmp_path / "digits" / f"summary{suffix}.json"
    summary = json.loads(path.read_text())
    assert summary["settings"]["steps"] == 40
    assert summary["tuning_settings"]["steps"] == 20
    assert (tmp_path / "figures" / f"adam_digits{suffix}.png").exists()
    capsys.readouterr()
    # With other settings there is nothing yet.
    assert main(["curves", "digits", "--runs-dir", str(tmp_path)]) == 2
    assert "with 1000 steps" in capsys.readouterr().err


def test_long_way_to_an_evaluation_is_taken_in_pieces(
    tmp_path, interrupt_at_first_news, monkeypatch
):
    command = [*TRAIN, "--learning-rate", "0.3", "--steps", "600"]
    command += ["--evaluation-interval", "300", "--runs-dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    begun_at = []
    interrupt_at_first_news([*command, str(tmp_path / "halves")])
    monkeypatch.setattr(
        "experiments.progress.GroupReport.begin",
        lambda _, step, newest: begun_at.append(step),
    )
    assert main([*command, str(tmp_path / "halves")]) == 0
    assert begun_at == [1]
    whole, halves = (
        next((tmp_path / name).glob("digits/m_svag/rate*"))
        for name in ("whole", "halves")
    )
    assert lines_of(halves) == lines_of(whole)
    assert [line["step"] for line in lines_of(whole)] == [0, 300, 600]


def test_methods_that_cannot_be_summed_up_are_left_out(smoke_runs, tmp_path, capsys):
    shutil.copytree(smoke_runs, tmp_path, dirs_exist_ok=True)
    records = tmp_path / "digits"
    # Of another version of Optax, say.
    shutil.copytree(records / "adam", records / "optax.former")
    # One whose every step size is stable.
    (harmless,) = records.glob("m_sgd/rate0.001_seed0_*")
    config = json.loads((harmless / "config.json").read_text())
    for point in range(-12, 19):
        config |= {
            "optimizer": "optax.contrib.cocob",
            "learning_rate": step_size(point),
        }
        directory = Store(tmp_path).directory(config_from_json(config))
        shutil.copytree(harmless, directory)
        (directory / "config.json").write_text(json.dumps(config))
    options = ["--smoke", "--runs-dir", str(tmp_path)]
    summary = records / "summary_smoke.json"
    summary.unlink()
    capsys.readouterr()
    assert main(["reproduce", "digits", "--optimizers", "m_ssd", *options]) == 0
    said = capsys.readouterr().err
    assert "Left out: Optax has no 'optax.former'" in said
    assert "Left out: optax.contrib.cocob cannot be tuned. Every step size" in said
    assert list(json.loads(summary.read_text())["methods"]) == list(FOUR_METHODS)
    assert main(["curves", "digits", *options]) == 0
    # Asked for, it is an error.
    command = ["tune", "digits", "--optimizers", "optax.contrib.cocob"]
    assert main([*command, *options]) == 2


def test_names_of_many_methods_make_a_file_name(tmp_path):
    names = [f"optax.{name}" for name in dir(optax)]
    assert commands._joined(names[:2]) == "_".join(names[:2])
    short = commands._joined(names)
    assert len(short) < 40
    assert short != commands._joined(names[1:])


def test_run_by_hand_is_no_replication(smoke_runs, capsys):
    summary = json.loads((smoke_runs / "digits" / "summary_smoke.json").read_text())
    rate = summary["methods"]["m_ssd"]["step_size"]
    options = ["--smoke", "--runs-dir", str(smoke_runs)]
    # With the tuning's seed and far from where it looks.
    command = ["train", "digits", "--optimizer", "m_ssd", *options]
    assert main([*command, "--learning-rate", "1e6"]) == 0
    command += ["--seed", "42"]
    assert main([*command, "--learning-rate", str(rate)]) == 0
    capsys.readouterr()
    assert main(["table", "digits", "--optimizers", "m_ssd", *options]) == 0
    (row,) = (r for r in capsys.readouterr().out.splitlines() if "| M-SSD" in r)
    assert row.split("|")[-2].strip() == "2"
