"""The command `dissect-optax`."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dissect_optax as do
from dissect_optax.dissection import Dissection, main
from dissect_optax.dissection import _command as command
from dissect_optax.dissection import _exit_status as ends

pytestmark = pytest.mark.usefixtures("quick_compilation")

REPOSITORY = Path(__file__).parents[2]
MODULE = """
from tests.dissection.small_problems import arguments

def problem():
    return arguments()

def misspelled():
    return arguments(batchsize=8)

def with_vector_loss():
    return arguments(loss=lambda w, example: w)

def in_directory():
    return arguments(directory="runs")

def nothing():
    pass

def incomplete():
    return {"loss": None, "init": None}

a_number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the current directory; its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_problems.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import a_missing_package")
    yield "my_problems"
    sys.modules.pop("my_problems", None)


def test_a_problem_of_the_current_directory_is_dissected(module, tmp_path, capsys):
    path = list(sys.path)
    options = ["--json", "result.json", "--html", "report.html", "--seeds", "3"]
    options += ["--steps", "10", "--budget", "race"]
    assert main([f"{module}:problem", *options]) == 0
    output = capsys.readouterr()
    result = Dissection.from_json((tmp_path / "result.json").read_text())
    assert output.out == f"{result}\nReport: report.html\n"
    assert output.err == ""
    setup = result.setup
    assert (setup.seeds, setup.steps, setup.budget) == (3, 10, "race")
    assert "<html" in (tmp_path / "report.html").read_text()
    assert sys.path == path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["my_problems"],
            "must be MODULE:FUNCTION, such as mymodule:problem, got 'my_",
        ),
        (["my_problems:"], "must be MODULE:FUNCTION"),
        ([":problem"], "must be MODULE:FUNCTION"),
        (["other:problem"], "There is no module 'other' in "),
        (["my_problems:other"], "has no function 'other'"),
        (["my_problems:a_number"], "has no function 'a_number'"),
        (["my_problems:nothing"], "must return a dictionary with `loss`, `init`"),
        (["my_problems:incomplete"], "must return a dictionary with `loss`, `init`"),
        (["my_problems:misspelled"], "'batchsize'. Did you mean 'batch_size'?"),
        (["my_problems:with_vector_loss"], "`loss` of one example must be one scalar"),
        (
            ["my_problems:problem", "--html", "a/b.html"],
            "directory of a/b.html does not",
        ),
        (["my_problems:problem", "--json", "."], ". is a directory"),
        (["my_problems:problem", "--steps", "997"], "got 997. Use 1000"),
        (["my_problems:problem", "--methods", "adm"], "Did you mean 'adam'?"),
        (["my_problems:problem", "--batch-size", "8", "8"], "different numbers"),
        (["my_problems:problem", "--directory", "my_problems.py"], "got the file"),
        (["my_problems:problem", "--mesh", "data"], "must be axes with their sizes"),
        (["my_problems:problem", "--mesh", "data=64"], "mesh needs 64 devices, and"),
        (["my_problems:problem", "--mesh", "rows=1"], "There is no mesh axis 'rows'"),
        (["my_problems:problem", "--processes", "2"], "are for `--distributed`"),
        (
            ["my_problems:problem", "--distributed", "--process-id", "0"],
            "coordinator, number of processes and process id together",
        ),
    ],
)
def test_a_mistake_is_a_sentence(module, arguments, sentence, capsys, monkeypatch):
    def trained(*_, **__):
        pytest.fail("not checked before training")

    monkeypatch.setattr("dissect_optax.dissection._dissect.dissect_problem", trained)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("dissect-optax: ")
    assert sentence in output.err
    assert "Traceback" not in output.err


def test_an_error_inside_the_module_is_not_hidden(module):
    with pytest.raises(ModuleNotFoundError, match="a_missing_package"):
        main(["broken:problem"])


@pytest.mark.parametrize(
    ("function", "options", "place"),
    [
        ("problem", [], "the beginning"),
        ("problem", ["--directory", "runs"], "the last checkpoint"),
        ("in_directory", [], "the last checkpoint"),
    ],
)
def test_an_interrupt_says_how_to_go_on(
    module, function, options, place, monkeypatch, capsys
):
    monkeypatch.setattr(command, "run", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main([f"{module}:{function}", *options]) == ends.INTERRUPTED
    assert f"goes on from {place}." in capsys.readouterr().err


def test_a_full_disk_is_a_sentence(module, monkeypatch, capsys):
    def full(options, arguments):
        error = OSError(28, "No space left on device", "runs/dissection/x.json")
        error.add_note("Two runs are kept.")
        raise error

    monkeypatch.setattr(command, "run", full)
    assert main([f"{module}:problem"]) == 2
    expected = (
        "dissect-optax: No space left on device: runs/dissection/x.json."
        " Two runs are kept.\n"
    )
    assert capsys.readouterr().err == expected


def test_help_and_version(capsys):
    for option, expected in (
        ("--version", do.__version__),
        ("--help", "MODULE:FUNCTION"),
    ):
        with pytest.raises(SystemExit) as found:
            main([option])
        assert found.value.code == 0
        assert expected in capsys.readouterr().out


# ---- Without the extra ------------------------------------------------------------

PROGRAM = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None
from dissect_optax import *
import dissect_optax
assert "dissect" in dir(dissect_optax), dir(dissect_optax)
assert callable(adam)
loaded = [name for name in sys.modules if name.startswith("dissect_optax.dissection")]
for use in (
    lambda: dissect_optax.dissect(None, None, None),
    lambda: dissect_optax.dissection,
    lambda: __import__("dissect_optax.dissection"),
):
    try:
        use()
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize("missing", [("rich", "jinja2"), ("orbax",)])
def test_without_the_extra_the_error_says_what_to_install(missing):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *missing],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert set(lines) == {lines[0]}
    assert "pip install 'dissect-optax[dissect]'" in lines[0]
    named = [
        name for name in ("jinja2", "orbax.checkpoint", "rich") if name in lines[0]
    ]
    assert [name.split(".")[0] for name in named] == sorted(missing)


def test_dissect_is_imported_when_it_is_used():
    program = (
        "import sys, dissect_optax; dir(dissect_optax);"
        "print('dissect_optax.dissection' in sys.modules, 'rich' in sys.modules);"
        "dissect_optax.dissect; print('dissect_optax.dissection' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.split() == ["False", "False", "True"]
