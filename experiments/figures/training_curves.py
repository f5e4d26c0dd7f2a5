"""Figure 3: training and test loss over steps, one column per problem."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from experiments.figures.style import WIDTH, color, line_style, save, style
from experiments.records import Record


def _curves(records: Sequence[Record], quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the quantity per run and step; NaN after a run diverged."""
    longest = max(records, key=lambda record: len(record.evaluations))
    steps = np.array([line.step for line in longest.evaluations])
    values = np.full((len(records), len(steps)), np.nan)
    for row, record in zip(values, records, strict=True):
        row[: len(record.evaluations)] = [
            getattr(line, quantity) for line in record.evaluations
        ]
    return steps, values


def _draw_band(
    axes: Axes, label: str, records: Sequence[Record], quantity: str
) -> None:
    """Mean of one method, shaded by one standard deviation."""
    steps, values = _curves(records, quantity)
    mean = values.mean(axis=0)
    method = records[0].config.optimizer
    shade = color(method)
    axes.plot(
        steps,
        mean,
        color=shade,
        linestyle=line_style(method),
        label=label,
    )
    if len(values) > 1:
        std = values.std(axis=0, ddof=1)
        axes.fill_between(
            steps, mean - std, mean + std, color=shade, alpha=0.2, linewidth=0
        )


def _use_plain_log_scale(axes: Axes) -> None:
    """A logarithmic axis whose ticks read 0.2, 0.5, 1, 2."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw(columns: Mapping[str, Mapping[str, Sequence[Record]]], path: Path) -> Path:
    """Draws the figure.

    Args:
      columns: By the problem's title, and by the method's label, the replications.
      path: Where to write it.

    Returns:
      The path.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
        axes = figure.subplots(2, len(columns), sharex="col", squeeze=False)
        for column, (title, methods) in enumerate(columns.items()):
            for row, quantity in enumerate(("training_loss", "test_loss")):
                for label, records in methods.items():
                    _draw_band(axes[row, column], label, records, quantity)
                _use_plain_log_scale(axes[row, column])
            axes[0, column].set_title(title)
            axes[0, column].margins(x=0.01)
            axes[1, column].set_xlabel("step")
        axes[0, 0].set_ylabel("training loss")
        axes[1, 0].set_ylabel("test loss")
        figure.align_ylabels()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        return save(figure, path)
