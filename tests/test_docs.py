"""What the pages show runs, and what they name exists."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dissect_optax
from dissect_optax import diagnostics, family, theory

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "experiments" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Its first line is a comment that names the file.
EXCERPT = re.compile(r"^```py\n# (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?<![\w/.])((?:[\w.]+/)+[\w.]+\.(?:py|md|toml|yml|json))\b")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # For what they write.
    program = "\n".join(CODE.findall(page.read_text()))
    exec(compile(program, page_name(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_excerpts_of_a_page_are_in_their_files(page: Path) -> None:
    for file, excerpt in EXCERPT.findall(page.read_text()):
        assert excerpt in (ROOT / file).read_text(), file


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/design.md"])
def test_files_that_a_page_names_exist(name: str) -> None:
    page = ROOT / name
    named = set(FILE.findall(page.read_text())) - {"experiments/problems/NAME.py"}
    assert named
    missing = {
        file
        for file in named
        if not ((ROOT / file).exists() or (page.parent / file).exists())
    }
    assert not missing


def test_commands_for_contributors_name_what_exists() -> None:
    commands = "".join(COMMAND.findall((ROOT / "CONTRIBUTING.md").read_text()))
    tests = re.findall(r"\b(tests(?:/\w+)*(?:\.py)?)\b", commands)
    modules = re.findall(r"-m ((?:benchmarks|experiments)[.\w]*)", commands)
    assert tests
    assert modules
    assert not [path for path in tests if not (ROOT / path).exists()]
    assert not [m for m in modules if importlib.util.find_spec(m) is None]


def test_the_readme_commands_are_those_of_the_checks() -> None:
    assert "-m pytest -n auto" in (ROOT / "README.md").read_text()
    assert "-m pytest -n auto" in (ROOT / ".ci" / "run").read_text()


def equation_rows() -> list[str]:
    # The first table explains symbols.
    _, _, page = (ROOT / "docs" / "equations.md").read_text().partition("\n## ")
    return [line for line in page.splitlines() if line.startswith("| ") and "`" in line]


def equation(row: str) -> str:
    return row.split("|")[1].strip()


@pytest.mark.parametrize("row", equation_rows(), ids=equation)
def test_names_and_tests_of_an_equation_exist(row: str) -> None:
    names = re.findall(r"`(dissect_optax(?:\.\w+)+)`", row)
    tests = re.findall(r"`((?:\w+/)?test_\w+)\.py::(test_\w+)`", row)
    assert names, "a row names what implements it"
    assert tests, "a row names what checks it"
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    for file, test in tests:
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
        functions = {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        }
        assert test in functions, f"{file}.py::{test}"


def test_the_api_page_has_every_public_name_in_its_order() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    documented = re.findall(
        r"^\.\. auto(?:function|class|data):: (\S+)$", page, re.MULTILINE
    )
    # Of the engine, the page has a choice.
    documented = [name for name in documented if ".dissection." not in name]
    assert documented == [
        *(f"dissect_optax.{name}" for name in dissect_optax.__all__),
        *(f"dissect_optax.theory.{name}" for name in theory.__all__),
        *(f"dissect_optax.diagnostics.{name}" for name in diagnostics.__all__),
        *(f"dissect_optax.family.{name}" for name in family.__all__),
    ]


needs_docs_extra = pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("furo", "myst_parser", "sphinx")
    ),
    reason="needs the extra `docs`",
)


@needs_docs_extra
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = ["-m", "sphinx", "-W", "--keep-going", "-c", "docs", "."]
    assert " ".join(command) in (ROOT / "CONTRIBUTING.md").read_text()
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(ROOT).with_suffix(".html")) for path in PAGES}
    missing = {page for page in pages if not (tmp_path / page).exists()}
    assert not missing
