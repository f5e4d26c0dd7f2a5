"""What each step size leads to: the end of every run, tuned or not."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dissect_optax.dissection import Record
from experiments.figures.style import WIDTH, colors, line_style, save, style


def _ends(records: Sequence[Record], quantity: str) -> tuple[list[float], list[float]]:
    """Step sizes, and the mean over seeds of the last value; NaN where all diverged."""
    rates = sorted({record.config.learning_rate for record in records})
    ends = []
    for rate in rates:
        found = [
            record.evaluations[-1][quantity]
            for record in records
            if record.config.learning_rate == rate and not record.diverged
        ]
        ends.append(float(np.mean(found)) if found else math.nan)
    return rates, ends


def draw(runs: Mapping[str, Sequence[Record]], title: str, path: Path) -> Path:
    """Draws the last training loss and test accuracy over the step size.

    Args:
      runs: All runs by the method's label.
      title: Title of the problem.
      path: Where to write it.

    Returns:
      The path.
    """
    method_of = {label: runs[label][0].config.optimizer for label in runs}
    shades = colors(method_of.values())
    with style():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        losses, accuracies = figure.subplots(1, 2, sharex=True)
        for axes, quantity in (
            (losses, "training_loss"),
            (accuracies, "test_accuracy"),
        ):
            for label, records in runs.items():
                method = method_of[label]
                axes.plot(
                    *_ends(records, quantity),
                    color=shades[method],
                    linestyle=line_style(method),
                    marker="o",
                    markersize=3,
                    label=label,
                )
            axes.set_xscale("log")
            axes.set_xlabel("step size")
        untrained = max(
            record.evaluations[0]["training_loss"]
            for records in runs.values()
            for record in records
        )
        losses.set_yscale("log")
        if losses.get_ylim()[1] > 2 * untrained:
            losses.set_ylim(top=2 * untrained)
        losses.set_ylabel("training loss after the last step")
        accuracies.set_ylabel("test accuracy after the last step")
        accuracies.yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.suptitle(title, fontsize=11)
        handles, labels = losses.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return save(figure, path)
