"""Which module may import which, read off the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dissect_optax

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "dissect_optax"

# Modules that any module of the library may import.
HELPERS = {"_checks", "_precision"}
# Module or package of the library -> those that it may import from.
ALLOWED_IMPORTS = {
    "__init__": {
        "_adaptation",
        "_estimate",
        "_masking",
        "_momentum",
        "_optimizers",
        "_sign",
        "_sources",
        "diagnostics",
        "family",
        "gradient_variance",
        "theory",
        # For type checkers, and when they are used.
        "dissection",
    },
    "_optimizers": {"_adaptation", "_momentum", "_sign", "_sources"},
    "_adaptation": {"_estimate", "_formulas"},
    "_masking": {"_estimate"},
    "_momentum": {"_estimate", "_formulas"},
    "_sign": {"_estimate", "_formulas"},
    "_sources": {"_estimate", "_formulas"},
    "_estimate": set(),
    "gradient_variance": {"gradient_variance", "_formulas"},
    "_checks": set(),
    "_precision": set(),
    "_formulas": set(),
    # A package by itself, which shares the formulas.
    "theory": {"theory", "_formulas"},
    # It uses the library as its users do.
    "dissection": {"__init__", "dissection", "diagnostics", "family"},
    # Measures with what the others define.
    "diagnostics": {
        "diagnostics",
        "gradient_variance",
        "theory",
        "_estimate",
        "_formulas",
        "_sources",
    },
    # Chains of the transformations, and parts like them.
    "family": {
        "family",
        "_adaptation",
        "_estimate",
        "_formulas",
        "_momentum",
        "_optimizers",
        "_sign",
        "_sources",
    },
}
BROUGHT_BY_THE_LIBRARY = {"dissect_optax", "jax", "numpy", "optax"}
# Of the extra `dissect`.
BROUGHT_BY_THE_EXTRA = {"filelock", "jinja2", "matplotlib", "orbax", "rich", "scipy"}


def modules_under(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py")) if folder.exists() else []


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path) -> set[str]:
    names = (name.split(".") for name in imported_names(path))
    modules = {
        parts[1] for parts in names if parts[0] == "dissect_optax" and len(parts) > 1
    }
    known = {entry.stem for entry in LIBRARY.iterdir()}
    # `from dissect_optax import Estimate` imports from the package itself.
    return {module if module in known else "__init__" for module in modules}


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


LIBRARY_FILES = modules_under(LIBRARY)


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=ids(LIBRARY_FILES))
def test_imports_go_one_way(path: Path) -> None:
    module = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    assert module in ALLOWED_IMPORTS, f"list what the new {module} may import"
    assert imported_modules(path) <= ALLOWED_IMPORTS[module] | HELPERS


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=ids(LIBRARY_FILES))
def test_library_needs_only_jax_and_optax(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported_names(path)}
    allowed = BROUGHT_BY_THE_LIBRARY | set(sys.stdlib_module_names)
    if path.is_relative_to(LIBRARY / "dissection"):
        allowed |= BROUGHT_BY_THE_EXTRA
    assert roots <= allowed


def test_the_import_loads_neither_the_engine_nor_its_packages() -> None:
    program = "import sys, dissect_optax; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    loaded = set(done.stdout.split())
    assert "dissect_optax._optimizers" in loaded
    assert "dissect_optax.dissection" not in loaded
    # JAX uses these itself.
    assert not loaded & (BROUGHT_BY_THE_EXTRA - {"filelock", "scipy"})


@pytest.mark.parametrize("name", ["_optimizers.py", "family/_optimizers.py"])
def test_optimizers_contain_no_mathematics(name: str) -> None:
    """They read like Table 1: chains, no arithmetic, no arrays."""
    path = LIBRARY / name
    tree = ast.parse(path.read_text("utf-8"))
    operators = {type(n.op) for n in ast.walk(tree) if isinstance(n, ast.BinOp)}
    assert operators <= {ast.BitOr}  # X | None in annotations
    assert not any(name.startswith("jax.numpy") for name in imported_names(path))


OUTSIDE = [
    path
    for folder in ("experiments", "benchmarks", "notebooks")
    for path in modules_under(ROOT / folder)
]


@pytest.mark.parametrize("path", OUTSIDE, ids=ids(OUTSIDE))
def test_the_rest_uses_public_names_only(path: Path) -> None:
    ours = [
        name
        for name in imported_names(path)
        if name.split(".")[0] == dissect_optax.__name__
    ]
    assert not [name for name in ours if "._" in name]
    attributes = [
        node.attr
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("dissect_optax", "do")
    ]
    private = {name for name in attributes if name.startswith("_")}
    assert private <= {"__version__"}  # Public, in spite of its underscores.


# What a figure may take from the engine.
NAMES_OF_RECORDS = {
    *(
        f"dissect_optax.dissection.{name}"
        for name in ("EqualWithNan", "Measurement", "Record", "RunConfig")
    ),
    "experiments.studies.study.StudyRecord",
    # What a record says, without running anything.
    *(
        f"experiments.studies.readings.{name}"
        for name in ("read_eigenbases", "read_starts")
    ),
}


def test_figures_read_records_only() -> None:
    """A figure can be drawn again without the library and without training."""
    for path in modules_under(ROOT / "experiments" / "figures"):
        names = set(imported_names(path)) - NAMES_OF_RECORDS
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"dissect_optax", "jax", "flax", "optax"}, path
        modules = {
            name.split(".")[1] for name in names if name.startswith("experiments.")
        }
        assert modules <= {"figures"}, path


def test_oracles_share_nothing_with_what_they_check() -> None:
    roots = {
        name.split(".")[0] for name in imported_names(ROOT / "tests" / "oracles.py")
    }
    assert roots <= {"numpy", "scipy"} | set(sys.stdlib_module_names)


def test_public_names_are_importable_and_nothing_else_is_listed() -> None:
    assert len(set(dissect_optax.__all__)) == len(dissect_optax.__all__)
    for name in dissect_optax.__all__:
        assert not name.startswith("_")
        assert getattr(dissect_optax, name).__doc__
