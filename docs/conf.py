"""Configuration of the documentation site.

    python -m sphinx -W --keep-going -c docs . docs/_build

Every warning and every link that leads nowhere is an error. The source folder is the
repository's root: the pages stay where a reader of the repository looks for them, and
a relative link between two of them, or to another file, works in both places.
"""

import re
from typing import Any

import dissect_optax
from dissect_optax import diagnostics, family, theory

project = "dissect_optax"
author = "The dissect_optax developers"
copyright = author
version = release = dissect_optax.__version__

# ---- Pages ---------------------------------------------------------------------------

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = True
root_doc = "README"
PAGES = {
    "Reference": ["docs/api", "docs/equations"],
    "Guides": [
        "experiments/README",
        "docs/family",
        "docs/dissect",
        "docs/gradient_variance",
        "docs/numerics",
        "docs/scaling",
        "docs/scaling_runs",
        "docs/theory",
    ],
    "Results": ["docs/reproduction", "docs/results", "benchmarks/README"],
    "Development": ["CONTRIBUTING", "docs/design", "CHANGELOG"],
}
include_patterns = [
    f"{page}.md" for page in [root_doc, *(p for part in PAGES.values() for p in part)]
]
# Folders that Sphinx need not look through.
exclude_patterns = [
    ".*",
    "build",
    "dissect_optax",
    "docs/_build",
    "experiments/results",
    "runs",
    "tests",
]

# ---- Markdown ------------------------------------------------------------------------

myst_heading_anchors = 3  # Links to headings, as repositories' web pages have them.


def add_contents(app: Any, page: str, source: list[str]) -> None:
    """Append the site's table of contents to its first page."""
    if page != root_doc:
        return
    for caption, pages in PAGES.items():
        entries = "\n".join(f"/{entry}" for entry in pages)
        options = f":hidden:\n:caption: {caption}"
        source[0] += f"\n```{{toctree}}\n{options}\n\n{entries}\n```\n"


# ---- Docstrings ----------------------------------------------------------------------

default_role = "code"
autodoc_typehints = "none"  # `Args` says what they are; the aliases of JAX are long.
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False
napoleon_custom_sections = ["Edge cases"]

# Of equal names the last counts: `adam` is the paper's.
PUBLIC = {
    **{
        name: f"dissect_optax.dissection.{name}"
        for name in ("Dissection", "Effect", "Problem", "Protocol", "UserError")
    },
    **{name: f"dissect_optax.diagnostics.{name}" for name in diagnostics.__all__},
    **{name: f"dissect_optax.family.{name}" for name in family.__all__},
    **{name: f"dissect_optax.theory.{name}" for name in theory.__all__},
    **{name: f"dissect_optax.{name}" for name in dissect_optax.__all__},
}
DATA = {
    "dissect_optax.family.MEMBERS": "Every member of the family by its name.",
    "dissect_optax.family.NEIGHBOURS": "Optimizers outside of it, with the reason.",
}
CODE = re.compile(r"(:[\w:]+:`.*?`|``.*?``|`.*?`)")
# |p| would be a substitution in reStructuredText, *parameter an emphasis.
MARKUP = re.compile(r"\||(?<![\w*\\])\*(?=\w)")


def adapt_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Link public names to their entries, and escape mathematics in the prose."""
    if what == "data":  # Sphinx takes the docstring of `dict`.
        lines[:] = [DATA[name]]
    literal_indent: int | None = None
    in_doctest = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            in_doctest = False
            continue
        if literal_indent is not None and indent > literal_indent:
            continue
        in_doctest = in_doctest or line.lstrip().startswith(">>>")
        if in_doctest:
            continue
        literal_indent = indent if line.rstrip().endswith("::") else None
        code_and_prose = CODE.split(line)
        code_and_prose[::2] = [MARKUP.sub(r"\\\g<0>", s) for s in code_and_prose[::2]]
        code_and_prose[1::2] = [_linked(s, name) for s in code_and_prose[1::2]]
        lines[number] = "".join(code_and_prose)


def _linked(code: str, documented: str) -> str:
    """A link to a public name, unless it is the one that is being documented."""
    target = PUBLIC.get(code.strip("`"))
    if target is None or target == documented or code.startswith(("``", ":")):
        return code
    return f":py:obj:`{code.strip('`')} <{target}>`"


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", adapt_docstring)


# ---- Appearance ----------------------------------------------------------------------

html_theme = "furo"
html_title = project
html_extra_path = ["index.html"]  # Leads to the first page.
