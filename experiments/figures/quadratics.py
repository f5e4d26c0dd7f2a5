"""Figure 2: SGD and SSD on stochastic quadratic problems."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.figures.style import WIDTH, color, save, style
from experiments.studies.study import StudyRecord

_LABELS = {"sgd": "SGD", "ssd": "SSD"}
# What falls below is as good as solved, and would flatten all other curves.
_LOWEST_LOSS = 1e-6


def _unique(record: StudyRecord, key: str) -> list[Any]:
    """The values of an entry, in the order of their first appearance."""
    return list(dict.fromkeys(result[key] for result in record.results))


def _draw_spectrum(axes: Axes, eigenvalues: list[float]) -> None:
    """A histogram of the eigenvalues."""
    axes.hist(eigenvalues, bins=20, color="#888888")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.grid(visible=False)


def _draw_losses(axes: Axes, result: dict[str, Any]) -> None:
    """The median over seeds, shaded from the second lowest to the second highest."""
    losses = np.maximum(np.array(result["losses"]), _LOWEST_LOSS / 10)
    low, median, high = np.quantile(losses, [0.1, 0.5, 0.9], axis=0)
    steps = np.arange(losses.shape[1])
    method = result["method"]
    axes.plot(steps, median, color=color(method), label=_LABELS[method])
    axes.fill_between(steps, low, high, color=color(method), alpha=0.2, linewidth=0)


def draw(record: StudyRecord, path: Path) -> Path:
    """Draws the figure.

    Args:
      record: The record of a `QuadraticStudy`.
      path: Where to write it.

    Returns:
      The path.
    """
    noises = _unique(record, "noise")
    rows = [
        (spectrum, orientation)
        for spectrum in _unique(record, "spectrum")
        for orientation in _unique(record, "orientation")
    ]
    with style():
        figure = Figure(figsize=(WIDTH, 7.6), layout="constrained")
        axes = figure.subplots(len(rows), 1 + len(noises), squeeze=False)
        for row, (spectrum, orientation) in zip(axes, rows, strict=True):
            for panel, noise in zip(row[1:], noises, strict=True):
                results = record.select(
                    spectrum=spectrum, orientation=orientation, noise=noise
                )
                for result in results:
                    _draw_losses(panel, result)
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(LogLocator(numticks=5))
                panel.minorticks_off()
                panel.sharey(row[1])
                if panel is not row[1]:
                    panel.tick_params(labelleft=False)
            _draw_spectrum(row[0], results[0]["eigenvalues"])
            lowest = row[1].get_ylim()[0]
            row[1].set_ylim(bottom=max(lowest, _LOWEST_LOSS))
            row[0].set_ylabel(f"{spectrum}\n{orientation}\n\ncount")
            row[1].set_ylabel("loss")
        axes[0, 0].set_title("spectrum")
        for panel, noise in zip(axes[0, 1:], noises, strict=True):
            panel.set_title(f"noise ν = {noise:g}")
        axes[-1, 0].set_xlabel("eigenvalue")
        for panel in axes[-1, 1:]:
            panel.set_xlabel("step")
        figure.align_ylabels(axes[:, 0])
        handles, labels = axes[0, 1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        return save(figure, path)
