"""Forecasts of the race and of one step beside the effects after training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from experiments.figures.style import WIDTH, save, style

_EFFECTS = {
    "sign": ("sign", "#D55E00", "o"),
    "variance_adaptation": ("variance adaptation", "#0072B2", "s"),
}


def _draw_forecast(
    axes: Axes, rows: Sequence[Mapping[str, Any]], forecast: str, title: str
) -> None:
    """Trained effects over one forecast; hollow where training decided nothing."""
    for effect, (label, color, marker) in _EFFECTS.items():
        for decided in (True, False):
            shown = [
                row
                for row in rows
                if row["effect"] == effect and row["trained_decided"] == decided
            ]
            values = [
                row["one_step"] if forecast == "one_step" else row["race"]["estimate"]
                for row in shown
            ]
            points = [
                (value, row["trained"]["estimate"])
                for value, row in zip(values, shown, strict=True)
                if value is not None and math.isfinite(value)
            ]
            axes.scatter(
                [x for x, _ in points],
                [y for _, y in points],
                s=22,
                marker=marker,
                facecolors=color if decided else "none",
                edgecolors=color,
                linewidths=0.9,
                label=label if decided else f"{label}, not decided",
            )
    for line in (axes.axhline, axes.axvline):
        line(0.0, color="#666666", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_yscale("symlog", linthresh=0.1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FormatStrFormatter("%+g"))
    axes.set_title(title)
    axes.set_xlabel("forecast")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws the figure.

    Args:
      rows: Rows of the calibration.
      path: Where to write it.

    Returns:
      The path.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_forecast(left, rows, "race", "race over a tenth of the steps")
        _draw_forecast(right, rows, "one_step", "improvement of one step")
        left.set_ylabel("effect after training\n(log loss; negative is better)")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2)
        return save(figure, path)
