"""Theorem 1: idealised SVAG converges at a constant step size, SGD stalls."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import WIDTH, color, line_style, save, style
from experiments.studies.study import StudyRecord

_LABELS = {"sgd": "SGD", "svag": "SVAG, exact factors"}


def _draw_errors(axes: Axes, result: dict[str, Any]) -> None:
    """Mean error over seeds, shaded by two standard errors."""
    # Step 0 has no place on a logarithmic axis.
    steps, mean, error = (
        np.array(result[key])[1:] for key in ("steps", "error", "standard_error")
    )
    shade = color(result["method"])
    axes.plot(
        steps,
        mean,
        color=shade,
        linestyle=line_style(result["method"]),
        label=_LABELS[result["method"]],
    )
    low = np.maximum(mean - 2 * error, mean / 10)
    axes.fill_between(steps, low, mean + 2 * error, color=shade, alpha=0.2, linewidth=0)


def draw(record: StudyRecord, path: Path) -> Path:
    """Draws the figure.

    Args:
      record: The record of a `ConvergenceStudy`.
      path: Where to write it.

    Returns:
      The path.
    """
    conditions = record.config["conditions"]
    with style():
        figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
        axes = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
        for panel, condition in zip(axes, conditions, strict=True):
            for result in record.select(condition=condition):
                _draw_errors(panel, result)
            (svag,) = record.select(condition=condition, method="svag")
            panel.plot(
                svag["steps"][1:],
                svag["bound"][1:],
                color="#222222",
                linestyle="dotted",
                linewidth=1.4,
                label="bound of Theorem 1 on SVAG",
            )
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_title(f"condition number {condition:g}")
            panel.set_xlabel("step")
            panel.text(
                0.05,
                0.06,
                f"SVAG's last slope: {svag['slope']:.2f}".replace("-", "−"),
                transform=panel.transAxes,
                fontsize=9,
            )
        axes[0].set_ylabel("expected error E[f] − f*")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        return save(figure, path)
