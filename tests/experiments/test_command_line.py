"""Every command at smoke size, what it says about mistakes, and kill and resume."""

import csv
import dataclasses
import errno
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import optax
import pytest
from matplotlib.image import imread

from dissect_optax.dissection import (
    FOUR_METHODS,
    RunConfig,
    Settings,
    Store,
    read_checked,
    step_size,
    write_checked,
)
from experiments import commands
from experiments.command_line import COMMANDS, main
from experiments.studies import convergence

TRAIN = ["train", "digits", "--optimizer", "m_svag"]
CHECKPOINTS = "digits/m_svag/unfinished/*/checkpoints"
RUN_GROUP = "dissect_optax.dissection._running._run_group"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory):
    """Records of the main job at smoke size."""
    runs = tmp_path_factory.mktemp("runs")
    # As in every test, so that nothing is compiled twice.
    with jax.numpy_rank_promotion("raise"):
        assert main(["--smoke", "--runs-dir", str(runs)]) == 0
    return runs


def lines_of(record):
    """The evaluations in a record, less the seconds."""
    lines = read_checked(record)["evaluations"]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_main_job_leaves_records_summary_and_figure(smoke_runs):
    summary = json.loads((smoke_runs / "digits" / "summary_smoke.json").read_text())
    assert list(summary["methods"]) == list(FOUR_METHODS)
    for name, method in summary["methods"].items():
        assert method["seeds"] == [1, 2]
        (record,) = smoke_runs.glob(
            f"digits/{name}/rate{method['step_size']:g}_seed1_*"
        )
        evaluations = lines_of(record)
        assert [line["step"] for line in evaluations] == [0, 10, 20]
        assert method["test_accuracies"][0] == evaluations[-1]["test_accuracy"]
        assert method["environment"]["jax"] == jax.__version__
    assert len(summary["effects_of_the_sign"]) == 2
    assert len(summary["effects_of_variance_adaptation"]) == 2
    pixels = imread(smoke_runs / "figures" / "figure_3_digits_smoke.png")
    assert pixels.std() > 0.05
    assert not list(smoke_runs.glob("digits/*/unfinished/*"))


def test_main_job_runs_nothing_twice(smoke_runs, monkeypatch, capsys):
    monkeypatch.setattr(RUN_GROUP, pytest.fail)
    assert main(["--smoke", "--runs-dir", str(smoke_runs)]) == 0
    printed = capsys.readouterr().out
    for label in ("M-SGD", "M-SSD", "M-SVAG", "ADAM", "ADAM − M-SVAG"):
        assert f"| {label} " in printed
    assert str(smoke_runs / "figures" / "figure_3_digits_smoke.png") in printed


def test_table_and_figure_come_from_records(smoke_runs, monkeypatch, capsys):
    monkeypatch.setattr(RUN_GROUP, pytest.fail)
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
        # There is no validation set.
        assert not [name for name in line if name.startswith("validation")]
        assert line == pytest.approx(other, rel=1e-4)


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
        (["table", "--optimizers", "adam", "adam"], "different values, got adam adam"),
        (["tune", "digits", "--mesh", "data"], "A mesh must be axes with their sizes"),
        (["reproduce", "digits", "--mesh", "data=64"], "needs 64 devices, and JAX"),
        (["dissect", "digits", "--mesh", "row=2"], "There is no mesh axis 'row'"),
        (["family", "digits", "--processes", "2"], "are for `--distributed`; give"),
        (
            ["tune", "digits", "--distributed", "--process-id", "1"],
            "process id together",
        ),
        (["curves", "digits", "--checkpoint-seconds", "nan"], "not be negative"),
        (
            ["train", "cifar100", "--optimizer", "optax.rprop", "--learning-rate", "1"],
            "'optax.rprop' takes no schedule of the learning rate",
        ),
        *(
            (
                ["train", "digits", "--optimizer", path, "--learning-rate", "1"],
                f"'{path}' is not an optimizer",
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
        *(
            (["curves", "digits", option, n], f"`{option}` .* got {n}")
            for option in ("--replicas", "--examples")
            for n in ("0", "-1")
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


def no_device():
    raise RuntimeError("Unable to initialize backend 'cuda': no device\nmore of it")


def test_a_device_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", no_device)
    # What fails first may say anything.
    monkeypatch.setattr("experiments.commands.table_of_runs", lambda _: [].pop())
    assert main(["list", "--runs-dir", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "JAX_PLATFORMS='cuda': Unable to initialize backend 'cuda'" in printed
    assert "more of it" not in printed


def test_another_error_is_not_blamed_on_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.commands.table_of_runs", lambda _: [].pop())
    with pytest.raises(IndexError):
        main(["list", "--runs-dir", str(tmp_path)])


def test_a_full_output_is_named_and_a_nonsense_display_is_no_obstacle():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "experiments", "--version"],
            cwd=REPOSITORY,
            env={**os.environ, "MPLBACKEND": "nonsense"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert "What is printed could not be written: No space left" in sentence


def test_version(capsys):
    assert main(["--version"]) == 0
    assert jax.__version__ in capsys.readouterr().out


# ---- What a directory holds --------------------------------------------------------


def test_list_counts_finished_and_unfinished_runs(
    smoke_runs, tmp_path, interrupt_at_first_report, capsys
):
    runs = tmp_path / "runs"
    shutil.copytree(smoke_runs, runs)
    interrupt_at_first_report(
        [*TRAIN, "--learning-rate", "77", "--smoke", "--runs-dir", str(runs)]
    )
    capsys.readouterr()
    assert main(["list", "--runs-dir", str(runs)]) == 0
    printed = capsys.readouterr().out
    finished = len(list(runs.glob("digits/m_svag/rate*.json")))
    (line,) = [line for line in printed.splitlines() if " m_svag " in line]
    assert line.split()[-3] == str(finished)
    assert line.split()[-1] == "1"
    assert "77" in line


def test_export_has_a_line_per_evaluation(smoke_runs, tmp_path, capsys):
    path = tmp_path / "all.csv"
    command = ["export", "--output", str(path), "--runs-dir", str(smoke_runs)]
    assert main(command) == 0
    assert str(path) in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = list(smoke_runs.glob("digits/*/rate*.json"))
    assert len(rows) == sum(len(lines_of(record)) for record in records)
    record = read_checked(records[0])
    config, last = record["config"], record["evaluations"][-1]
    (row,) = [
        row
        for row in rows
        if row["optimizer"] == config["optimizer"]
        and float(row["learning_rate"]) == config["learning_rate"]
        and int(row["seed"]) == config["seed"]
        and int(row["step"]) == last["step"]
    ]
    assert float(row["training_loss"]) == last["training_loss"]


def test_train_takes_several_step_sizes_and_seeds(tmp_path, capsys):
    command = [*TRAIN, "--learning-rate", "0.1", "0.3", "--seed", "4", "5", "--smoke"]
    assert main([*command, "--runs-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for rate in ("0.1", "0.3"):
        for seed in (4, 5):
            assert f"step size {rate}, seed {seed}: training loss" in printed
            assert (
                len(list(tmp_path.glob(f"digits/m_svag/rate{rate}_seed{seed}_*"))) == 1
            )


# ---- An optimizer of one's own -----------------------------------------------------

OPTIMIZERS = """
import optax

def clipped(learning_rate):
    return optax.chain(optax.clip(1.0), optax.sgd(learning_rate))

def deaf(learning_rate):
    return optax.sgd(0.1)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module with optimizers; its name."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_optimizers.py").write_text(OPTIMIZERS)
    yield "own_optimizers"
    sys.modules.pop("own_optimizers", None)


def test_an_optimizer_of_ones_own_is_trained_and_found_again(
    own_module, tmp_path, capsys
):
    name = f"{own_module}:clipped"
    options = ["--smoke", "--runs-dir", str(tmp_path / "runs")]
    command = ["train", "digits", "--optimizer", name, "--learning-rate", "0.1"]
    assert main([*command, *options]) == 0
    (record,) = (tmp_path / "runs" / "digits" / name).glob("rate0.1_seed0_*.json")
    first = record.read_bytes()
    assert "clipped, step size 0.1" in capsys.readouterr().out
    assert main([*command, *options]) == 0
    assert record.read_bytes() == first
    # Edited, it is another optimizer.
    changed = OPTIMIZERS.replace("clip(1.0)", "clip(0.5)")
    (tmp_path / "own_optimizers.py").write_text(changed)
    sys.modules.pop(own_module)
    importlib.invalidate_caches()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert main([*command, *options]) == 0
    assert len(list(record.parent.glob("rate0.1_seed0_*.json"))) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_optimizers:cliped", "no function in own_optimizers 'cliped'. Did you"),
        ("own_optimizers:deaf", "ignores its learning rate"),
        ("no_such_module:adam", "'no_such_module' .* cannot be imported"),
        ("own_optimizers:", "Expected a module and a function in it"),
        ("own/optimizers:clipped", "Expected a module and a function in it"),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_an_optimizer_that_is_not_there_is_named(name, message, tmp_path, capsys):
    command = ["train", "digits", "--optimizer", name, "--learning-rate", "0.1"]
    assert main([*command, "--smoke", "--runs-dir", str(tmp_path / "runs")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


# ---- Help, and interruptions -------------------------------------------------------


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"[│•] +{name} ", printed) for name in COMMANDS)


def test_interrupt_loses_nothing_and_says_how_to_go_on(
    tmp_path, interrupt_at_first_report, monkeypatch, capsys
):
    command = [*TRAIN, "--learning-rate", "0.3"]
    command += ["--smoke", "--runs-dir", str(tmp_path)]
    begun_at = []
    interrupt_at_first_report(command)
    said = capsys.readouterr().err
    assert "Stopping in a moment" in said
    assert "The same command goes on" in said
    assert said.rstrip().endswith(shlex.join(["python", "-m", "experiments", *command]))

    monkeypatch.setattr(
        "dissect_optax.dissection._progress.GroupReport.begin",
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


def test_interrupt_ends_a_study(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "experiments.studies.convergence.make_problem",
        interrupted_by(convergence.make_problem),
    )
    assert main(["convergence", "--smoke", "--runs-dir", str(tmp_path)]) == 130
    assert not list(tmp_path.glob("studies/convergence*"))


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
    ids=lambda number: number.name,
)
def test_signal_ends_a_process_that_says_how_to_go_on(number, tmp_path):
    command = [*TRAIN, "--learning-rate", "0.3", "--steps", "1000000", "--runs-dir"]
    command += [str(tmp_path), "--checkpoint-seconds", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", *command],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(f"{CHECKPOINTS}/*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Stopping in a moment." in errors
    assert "The same command goes on" in errors
    assert shlex.join(command) in errors


# ---- Records and checkpoints that are not what was written -------------------------


def one_sentence(capsys):
    """What the command said about a mistake."""
    message = capsys.readouterr().err.strip()
    assert message.startswith("python -m experiments: ")
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_damaged_checkpoint_ends_in_one_sentence(
    tmp_path, interrupt_at_first_report, capsys
):
    command = [*TRAIN, "--learning-rate", "0.3", "--smoke", "--runs-dir"]
    command.append(str(tmp_path / "runs"))
    interrupt_at_first_report(command)
    (path,) = tmp_path.glob("runs/digits/m_svag/unfinished/*/group.json")
    content = read_checked(path)
    content["configs"][0]["problem"] = "../../outside"
    write_checked(path, content)
    capsys.readouterr()
    assert main(command) == 2
    message = one_sentence(capsys)
    assert f"The checkpoint in {path.parent} cannot be read: " in message
    assert message.endswith("Remove that directory to begin these runs again.")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    shutil.rmtree(path.parent)
    assert main(command) == 0


def test_edited_record_ends_in_one_sentence(smoke_runs, tmp_path, capsys):
    shutil.copytree(smoke_runs / "digits", tmp_path / "digits")
    path = min(tmp_path.glob("digits/adam/rate*_seed1_*.json"))
    path.write_text(
        re.sub(r'test_accuracy": [\d.]+', 'test_accuracy": 1.0', path.read_text())
    )
    capsys.readouterr()
    assert main(["table", "--smoke", "--runs-dir", str(tmp_path)]) == 2
    assert f"The record {path} cannot be read" in one_sentence(capsys)


def test_replicas_are_up_to_the_user(tmp_path, monkeypatch):
    sizes = []

    def note(job, method, title, group):
        sizes.append(group.size)
        raise KeyboardInterrupt

    monkeypatch.setattr(RUN_GROUP, note)
    options = ["--smoke", "--runs-dir", str(tmp_path), "--replicas", "3"]
    assert main(["tune", "digits", *options]) == 130
    assert main([*TRAIN, "--learning-rate", "1", *options]) == 130
    assert sizes == [3, 3]


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


def test_methods_that_cannot_be_summed_up_are_left_out(smoke_runs, tmp_path, capsys):
    shutil.copytree(smoke_runs, tmp_path, dirs_exist_ok=True)
    records = tmp_path / "digits"
    # Of another version of Optax, say.
    shutil.copytree(records / "adam", records / "optax.former")
    # One that is stable at no step size, and one that is at every one.
    (harmless,) = records.glob("m_sgd/rate*_seed1_*")
    content = read_checked(harmless)
    settings = Settings(**content["config"].pop("settings"))
    for name, last in (("optax.contrib.cocob", 2.0), ("optax.lion", 0.25)):
        for line, loss in zip(content["evaluations"], (1.0, 0.5, last), strict=True):
            line["training_data_loss"] = loss
        for point in range(-32, 19):
            content["config"] |= {
                "optimizer": name,
                "learning_rate": step_size(point),
                "seed": 0,
            }
            config = RunConfig(**content["config"], settings=settings)
            edited = content | {"config": dataclasses.asdict(config)}
            write_checked(Store(tmp_path).path(config), edited)
    options = ["--smoke", "--runs-dir", str(tmp_path)]
    summary = records / "summary_smoke.json"
    summary.unlink()
    capsys.readouterr()
    assert main(["reproduce", "digits", "--optimizers", "m_ssd", *options]) == 0
    said = capsys.readouterr().err
    assert "Left out: Optax has no 'optax.former'" in said
    assert "Left out: optax.contrib.cocob cannot be tuned. No step size" in said
    assert list(json.loads(summary.read_text())["methods"]) == list(FOUR_METHODS)
    assert main(["curves", "digits", *options]) == 0
    # Asked for, it is an error.
    command = ["tune", "digits", "--optimizers", "optax.contrib.cocob"]
    assert main([*command, *options]) == 2
    capsys.readouterr()
    assert main(["tune", "digits", "--optimizers", "optax.lion", *options]) == 0
    said = capsys.readouterr().out
    assert "largest stable 1e+06, the largest that was tried" in said


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
