"""Pictures of a report: SVG of aggregates, one panel each so that they fit a phone.

Methods differ in colour and in the pattern of their line, so that any two can be told
apart without colours, too.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dissect_optax.dissection._effects import (
    Effects,
    clip_losses,
    race_finalists,
    select_runs,
)
from dissect_optax.dissection._rows import (
    Run,
    Tuning,
    is_interval,
    number,
)

if TYPE_CHECKING:
    from dissect_optax.dissection._result import Dissection

# Okabe & Ito's palette, which people with any common colour vision can tell apart.
_COLORS = {
    "m_sgd": "#0072B2",
    "m_ssd": "#E69F00",
    "m_svag": "#009E73",
    "adam": "#D55E00",
}
_OTHER_COLORS = ("#CC79A7", "#000000", "#56B4E9", "#777777", "#882255", "#999933")
_PATTERNS: dict[str, Any] = {
    "adam": "-",
    "m_sgd": (0, (5, 2)),
    "m_ssd": (0, (1, 1.2)),
    "m_svag": (0, (5, 1.5, 1, 1.5)),
}

_SIZE = (4.6, 3.3)  # Inches; 11 px of text at the width of a phone.
_POINTS_OF_ALL_CURVES = 40_000
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#666666",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    # A long handle shows the pattern of the line.
    "legend.handlelength": 3.2,
    # Text stays text: it can be searched and read out, and the file is small.
    "svg.fonttype": "none",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
      section: Where it belongs: "effects", "curves", "step_sizes" or "measurements".
      svg: An `<svg>` element.
      caption: What it shows, in a sentence.
    """

    section: str
    svg: str
    caption: str


def line_styles(methods: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """Colour and line pattern by method; no two methods have the same pattern.

    Args:
      methods: Their names.

    Returns:
      By name, the colour and matplotlib's line style.

    Examples:
      >>> styles = line_styles(["adam", "muon", "lion"])
      >>> styles["adam"], styles["muon"][1] == styles["lion"][1]
      (('#D55E00', '-'), False)
    """
    colors = itertools.cycle(_OTHER_COLORS)
    styles = {}
    dots = itertools.count(2)
    for name in dict.fromkeys(methods):
        if name in _COLORS:
            styles[name] = (_COLORS[name], _PATTERNS[name])
        else:
            pattern = (0, (6, 1.5) + (1, 1.5) * next(dots))
            styles[name] = (next(colors), pattern)
    return styles


def pictures(result: "Dissection", prefix: str) -> list[Picture]:
    """All pictures of a report.

    Args:
      result: The result.
      prefix: Beginning of every id in the pictures.

    Returns:
      The pictures in order; those for which there are no rows are missing.
    """
    drawn = [
        *_of_effects(result),
        *_of_curves(result),
        *_of_step_sizes(result),
        *_of_measurements(result),
    ]
    return [
        Picture(section, _to_svg(figure, f"{prefix}-{index}", caption), caption)
        for index, (section, figure, caption) in enumerate(drawn)
    ]


_Drawn = tuple[str, Figure, str]


# ---- Matplotlib -------------------------------------------------------------------


def _text(label: str) -> str:
    """A label as it is: no mathematics, and shown in a legend."""
    escaped = label.replace("$", r"\$")
    # Matplotlib leaves labels that begin with an underscore out of legends.
    return f" {escaped}" if escaped.startswith("_") else escaped


@contextlib.contextmanager
def _new_panel(title: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one panel, in the style of all."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(_text(title), loc="left")
        yield figure, axes


def _add_legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """A legend below the panel, each label once."""
    handles, labels = axes.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    if found:
        # One more row of the legend must not make the panel lower.
        rows = math.ceil(len(found) / columns)
        figure.set_size_inches(_SIZE[0], _SIZE[1] + 0.2 * max(rows - 1, 0))
        figure.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=columns
        )


def _to_svg(figure: Figure, prefix: str, caption: str) -> str:
    """An `<svg>` element whose ids begin with the prefix."""
    text = io.StringIO()
    # The salt makes ids, and so the file, the same each time.
    with mpl.rc_context(_STYLE | {"svg.hashsalt": prefix}), warnings.catch_warnings():
        # The font of the one who reads has letters that ours may lack.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    # The page decides about the size.
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{_escape(caption)}">{rest}'


def _escape(text: str) -> str:
    for letter, entity in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ('"', "&quot;"),
    ):
        text = text.replace(letter, entity)
    return text


def _plain_log_ticks(axes: Axes, which: str) -> None:
    """Ticks of a logarithmic axis that read 0.2, 0.5, 1, 2."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    subs = (
        (1.0,)
        if high > 300 * low
        else (1.0, 2.0, 5.0)
        if high < 30 * low
        else (1.0, 3.0)
    )
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


# ---- Effects ----------------------------------------------------------------------

_EFFECT_COLORS = {"sign": "#E69F00", "variance_adaptation": "#009E73"}
_MARKERS = {"sign": "o", "variance_adaptation": "s", "interaction": "D"}


def _of_effects(result: "Dissection") -> Iterator[_Drawn]:
    """Effects with their intervals."""
    race = result.setup.budget == "race"
    by_batch_size = result.race_effects if race else result.headline_effects
    if not any(row.effects for row in by_batch_size.values()):
        return
    with _new_panel("Effects on the mean log training loss") as (figure, axes):
        _draw_effects(axes, by_batch_size)
        _add_legend(figure, axes, columns=3)
    yield (
        "effects",
        figure,
        "Effects with 95 % intervals"
        f"{' over the steps of the race' if race else ''}; to the left of zero is"
        " better. Hollow: not decided.",
    )


def _draw_effects(axes: Axes, by_batch_size: Mapping[int, Effects]) -> None:
    """One row per batch size, one mark per effect."""
    sizes = list(by_batch_size)
    for row, batch_size in enumerate(sizes):
        for index, (name, effect) in enumerate(
            by_batch_size[batch_size].effects.items()
        ):
            if not math.isfinite(effect.estimate):
                continue
            color = _EFFECT_COLORS.get(name, "#444444")
            place = row + 0.22 * (index - 1)
            if math.isfinite(effect.half_width):
                axes.plot([effect.low, effect.high], [place, place], color=color)
            axes.plot(
                *([effect.estimate], [place]),
                marker=_MARKERS.get(name, "o"),
                linestyle="none",
                color=color,
                markerfacecolor=color if effect.decided else "white",
                label=name.replace("_", " "),
            )
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_yticks(range(len(sizes)), [f"batch {size:,}" for size in sizes])
    axes.set_ylim(len(sizes) - 0.5, -0.5)
    axes.set_xlabel("difference of log losses")


# ---- Training curves --------------------------------------------------------------


def _of_curves(result: "Dissection") -> Iterator[_Drawn]:
    """Training loss over steps, one panel per batch size."""
    race = result.setup.budget == "race"
    styles = line_styles(result.setup.methods)
    curves = max(len(result.setup.batch_sizes) * len(styles), 1)
    points = min(max(_POINTS_OF_ALL_CURVES // (3 * curves), 20), 200)
    for batch_size in result.setup.batch_sizes:
        runs = select_runs(result.runs, batch_size, "race" if race else "replicate")
        if race:
            runs = race_finalists(runs, result.setup.race_steps)
        if not runs:
            continue
        with _new_panel(f"Training loss, batch size {batch_size:,}") as (figure, axes):
            for method, label in result.setup.methods.items():
                chosen = [run for run in runs if run.method == method]
                if chosen:
                    _draw_curve(axes, label, chosen, styles[method], points)
            axes.set_yscale("log")
            _plain_log_ticks(axes, "y")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_xlabel("step")
            _add_legend(figure, axes)
        yield (
            "curves",
            figure,
            f"Training loss at batch size {batch_size:,}: geometric mean over seeds,"
            " with a band of one standard deviation.",
        )


def _draw_curve(
    axes: Axes, label: str, runs: Sequence[Run], style: tuple[str, Any], points: int
) -> None:
    """Geometric mean and band of the runs that did not diverge."""
    finished = [run for run in runs if not run.diverged]
    color, pattern = style
    if diverged := len(runs) - len(finished):
        label += f" ({diverged} of {len(runs)} diverged)"
    if not finished:
        axes.plot([], [], color=color, linestyle=pattern, label=_text(label))
        return
    # Runs are evaluated at the same steps; one that was not has no place in a mean.
    steps = max(finished, key=lambda run: len(run.steps)).steps
    logs = np.log(
        [clip_losses(r.training_loss)[0] for r in finished if r.steps == steps]
    )
    kept = np.unique(
        np.linspace(0, len(steps) - 1, min(points, len(steps))).astype(int)
    )
    x, logs = np.asarray(steps)[kept], logs[:, kept]
    mean = logs.mean(axis=0)
    axes.plot(x, np.exp(mean), color=color, linestyle=pattern, label=_text(label))
    if len(logs) > 1:
        std = logs.std(axis=0, ddof=1)
        low, high = np.exp(mean - std), np.exp(mean + std)
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


# ---- Step sizes -------------------------------------------------------------------


def _of_step_sizes(result: "Dissection") -> Iterator[_Drawn]:
    """Outcome over the step size, one panel per batch size."""
    styles = line_styles(result.setup.methods)
    for batch_size in result.setup.batch_sizes:
        tunings = [t for t in result.tunings if t.batch_size == batch_size]
        tunings = [t for t in tunings if any(stable for _, _, stable in t.candidates)]
        if not tunings:
            continue
        title = f"Outcome over the step size, batch size {batch_size:,}"
        with _new_panel(title) as (figure, axes):
            for tuning in tunings:
                label = result.setup.methods.get(tuning.method, tuning.method)
                _draw_tuning(axes, label, tuning, styles.get(tuning.method))
            axes.set_xscale("log")
            _plain_log_ticks(axes, "x")
            axes.set_xlabel("step size")
            axes.set_ylabel("mean log training loss")
            _add_legend(figure, axes)
        yield (
            "step_sizes",
            figure,
            f"Mean outcome over tuning seeds at batch size {batch_size:,}; a ring marks"
            " the step size that won. Unstable step sizes are left out.",
        )


def _draw_tuning(
    axes: Axes, label: str, tuning: Tuning, style: tuple[str, Any] | None
) -> None:
    """Outcomes of the stable step sizes, with a ring around the winner."""
    color, pattern = style or ("#444444", "-")
    stable = [
        (rate, outcome)
        for rate, outcome, is_stable in tuning.candidates
        if is_stable and math.isfinite(outcome)
    ]
    rates, outcomes = [rate for rate, _ in stable], [outcome for _, outcome in stable]
    axes.plot(
        *(rates, outcomes),
        color=color,
        linestyle=pattern,
        marker=".",
        markersize=5,
        label=_text(label),
    )
    for rate, outcome in stable:
        if rate == tuning.learning_rate:
            axes.plot(
                *([rate], [outcome]),
                marker="o",
                markersize=10,
                color=color,
                markerfacecolor="none",
                linestyle="none",
            )


# ---- Measurements -----------------------------------------------------------------

_TITLES = {
    "noise_scale": "Noise scale",
    "sign_success": "Sign success",
    "dominance": "Diagonal dominance",
}


def _of_measurements(result: "Dissection") -> Iterator[_Drawn]:
    """Measured quantities over training."""
    rows = result.measurements
    styles = line_styles(result.setup.methods)
    for quantity, title in _TITLES.items():
        series: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
        style_of = {}
        # Colours tell methods apart here, patterns and markers batch sizes.
        patterns = itertools.cycle(_PATTERNS.values())
        marks = zip(itertools.cycle("osD^v"), patterns, strict=False)
        mark_of = dict(zip(result.setup.batch_sizes, marks, strict=False))
        for row in rows:
            entry = row.diagnostics.get(quantity)
            if is_interval(entry):
                method = result.setup.methods.get(row.method, row.method)
                label = f"{method}, batch {row.batch_size:,}"
                series.setdefault(label, []).append((row.step, entry))
                color, _ = styles.get(row.method, ("#444444", "-"))
                marker, pattern = mark_of.get(row.batch_size, ("o", "-"))
                style_of[label] = (color, pattern, marker)
        if not series:
            continue
        with _new_panel(title) as (figure, axes):
            _draw_series(axes, series, style_of)
            _add_legend(figure, axes)
        yield (
            "measurements",
            figure,
            f"{title} at the start, the middle and the end of training, with 95 %"
            " intervals where they are bounded.",
        )


def _draw_series(
    axes: Axes,
    series: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]],
    styles: Mapping[str, tuple[str, Any, str]],
) -> None:
    """Intervals over steps, one line per label."""
    drawn = []
    for label, entries in series.items():
        color, pattern, marker = styles[label]
        points = sorted(
            (step, number(entry["value"]), entry) for step, entry in entries
        )
        finite = [point for point in points if math.isfinite(point[1])]
        axes.plot(
            *([step for step, _, _ in finite], [value for _, value, _ in finite]),
            color=color,
            linestyle=pattern,
            marker=marker,
            markersize=5,
            label=_text(label),
        )
        for step, value, entry in finite:
            low, high = number(entry["low"]), number(entry["high"])
            drawn.append(value)
            if math.isfinite(low) and math.isfinite(high):
                axes.plot([step, step], [low, high], color=color, linewidth=1)
                drawn += [low, high]
    if drawn and min(drawn) > 0 and max(drawn) > 30 * min(drawn):
        axes.set_yscale("log")
        _plain_log_ticks(axes, "y")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
