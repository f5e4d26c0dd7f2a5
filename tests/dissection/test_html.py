import html.parser
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dissect_optax.dissection._html import render
from dissect_optax.dissection._pictures import line_styles, pictures
from dissect_optax.dissection._result import Dissection, MeasurementRow, Tuning
from dissect_optax.dissection._verdict import anchor
from tests.dissection.examples import (
    FALLS,
    LABELS,
    make_example,
    make_run,
    make_runs,
    make_setup,
)

TWO_MEGABYTES = 2_000_000
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Tags, ids, links and text of a page; raises where tags do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "xlink:href"):
                self.links.append(value or "")
            elif name in ("src", "srcset", "data", "action"):
                self.sources.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\xa0", " ").split())


@pytest.fixture(scope="module")
def example() -> Dissection:
    return make_example()


# Drawing takes most of the time, so the tests share one page.
@pytest.fixture(scope="module")
def path(example: Dissection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example.to_html(tmp_path_factory.mktemp("page") / "reports" / "mine.html")


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return Page(path.read_text("utf-8"))


def test_one_file_is_written(path: Path) -> None:
    assert path.read_text("utf-8").lstrip().startswith("<!DOCTYPE html>")
    assert path.stat().st_size < TWO_MEGABYTES
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_loaded_and_nothing_runs(page: Page, path: Path) -> None:
    assert page.sources == []
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe", "image", "object"} & set(page.tags)
    text = path.read_text("utf-8")
    # The names of the two formats of a picture are addresses that nobody opens.
    addresses = set(re.findall(r"https?://[^\"'<>\s)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"@import|url\((?!#)", text)


def test_every_sentence_links_to_its_cell(page: Page, example: Dissection) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    for reading in example.verdict:
        assert " ".join(reading.text.split()) in page.text
        assert any(link.endswith(anchor(reading.evidence)) for link in page.links)


def test_tables_pictures_warnings_and_setup_are_there(
    page: Page, example: Dissection
) -> None:
    # One of effects, two of training, two of step sizes, two of measurements.
    assert page.tags.count("svg") == page.tags.count("figcaption") == 7
    for warning in example.warnings:
        assert warning.sentence in page.text
    for words in ("1f0c2a9b", "0.10.2", "noise scale", "M-SVAG (1 of 5 diverged)"):
        assert words in page.text
    assert " ".join(example.scope.split()) in page.text


def test_names_are_escaped(page: Page) -> None:
    nasty = "<script>alert('$x$')</script>"
    methods = {"adam": nasty, "_x": "_hidden $\\frac$", "y": "日本"}
    setup = make_setup(
        title=nasty, methods=methods, schedule=nasty, environment={nasty: nasty}
    )
    falls = dict.fromkeys(methods, 1.0)
    text = render(Dissection(setup, make_runs(falls)), fragment=False)
    found = Page(text)
    assert "script" not in found.tags
    assert nasty in found.text
    assert "_hidden $\\frac$" in found.text
    assert "日本" in found.text


def make_small(title: str = "A network") -> Dissection:
    return Dissection(make_setup(title=title), make_runs(seeds=(1, 2)))


def test_pictures_are_well_formed_and_the_same_each_time() -> None:
    first, second = (pictures(make_small(), "p") for _ in range(2))
    assert [picture.section for picture in first] == ["effects", "curves"]
    assert first == second
    for picture in first:
        root = ElementTree.fromstring(picture.svg)
        assert root.get("viewBox")
        assert root.get("width") is None
        assert root.get("aria-label") == picture.caption
        names = [n for n in (e.get("id") for e in root.iter()) if n]
        assert names
        assert all(name.startswith("p-") for name in names)


def test_two_results_in_a_notebook_share_no_id() -> None:
    one, other = (Page(make_small(title)._repr_html_()) for title in ("One", "Other"))
    assert "html" not in one.tags
    assert one.ids
    assert not set(one.ids) & set(other.ids)


def test_any_two_methods_differ_without_colours() -> None:
    styles = line_styles([*LABELS, *(f"other{index}" for index in range(12))])
    for (_, one), (_, other) in itertools.combinations(styles.values(), 2):
        assert one != other
    # The first ten also have colours of their own.
    assert len({color for color, _ in list(styles.values())[:10]}) == 10


def test_many_methods_long_runs_and_many_batch_sizes_stay_small() -> None:
    methods = LABELS | {f"other{index}": f"Other {index}" for index in range(8)}
    sizes = (8, 32, 128)
    runs = [
        run
        for size in sizes
        for run in make_runs(
            {name: 2.0 for name in methods},
            seeds=(1, 2),
            batch_size=size,
            evaluations=1001,
        )
    ]
    setup = make_setup(
        methods=methods, batch_sizes=sizes, environment={"long": "x" * 10**6}
    )

    assert len(render(Dissection(setup, runs), fragment=False)) < TWO_MEGABYTES


@pytest.mark.parametrize("budget", ["full", "race"])
@pytest.mark.parametrize("seeds", [0, 1, 2])
def test_little_or_nothing_makes_a_page(budget: str, seeds: int) -> None:
    role = {"full": "replicate", "race": "race"}[budget]
    runs = make_runs(FALLS, range(seeds), role=role)
    result = Dissection(make_setup(budget=budget, seeds=seeds), runs)
    found = Page(render(result, fragment=False))
    if seeds == 0:
        assert "There are no runs to compare." in found.text
    if seeds == 1:
        assert "unbounded" in found.text


def test_odd_numbers_make_a_page() -> None:
    nothing = Tuning(
        "adam", 8, math.nan, math.nan, ((0.1, math.nan, False),), (), True, 1, 0
    )
    odd = {
        "noise_scale": {"value": math.nan, "low": -math.inf, "high": math.inf},
        "sign_success": {"value": None, "low": None, "high": None},
        "dominance": {"value": 0.5, "low": 0.4, "high": math.inf},
    }
    runs = [make_run("adam", seed, 1.0, diverged=True) for seed in (1, 2)]
    result = Dissection(
        make_setup(seconds=math.nan),
        runs,
        [nothing],
        [MeasurementRow("adam", 8, "start", 0, odd)],
    )
    found = Page(render(result, fragment=False))
    assert "2 of 2" in found.text
    assert "NothingStable" in found.text
    assert "nan" not in found.text.lower().split()
