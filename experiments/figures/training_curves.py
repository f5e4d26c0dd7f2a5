"""Figures 3, 6 and 7: training and test loss over steps, one column per problem."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from experiments.figures.style import WIDTH, color, line_style, save, style
from experiments.records import Record

_LEGEND_COLUMNS = 4


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


def _opacities(lines: Mapping[str, Sequence[Record]]) -> dict[str, float]:
    """How strongly a line is drawn: among those of one method, each more than the last.

    Methods have a colour each; this tells their step sizes apart.
    """
    method_of = {label: records[0].config.optimizer for label, records in lines.items()}
    totals = Counter(method_of.values())
    counts: Counter[str] = Counter()
    opacities = {}
    for label, method in method_of.items():
        counts[method] += 1
        opacities[label] = counts[method] / totals[method]
    return opacities


def _draw_band(
    axes: Axes, label: str, records: Sequence[Record], quantity: str, opacity: float
) -> None:
    """Mean of one method, shaded by one standard deviation."""
    # One that diverged would take the mean with it; the label says how many did.
    finished = [record for record in records if not record.diverged]
    if len(finished) < len(records):
        label += f" ({len(records) - len(finished)} of {len(records)} diverged)"
    steps, values = _curves(finished or records, quantity)
    mean = values.mean(axis=0)
    method = records[0].config.optimizer
    shade = color(method)
    axes.plot(
        steps,
        mean,
        color=shade,
        linestyle=line_style(method),
        alpha=opacity,
        label=label,
    )
    if len(values) > 1:
        std = values.std(axis=0, ddof=1)
        axes.fill_between(
            steps,
            mean - std,
            mean + std,
            color=shade,
            alpha=0.2 * opacity,
            linewidth=0,
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
      columns: By the problem's title, and by the line's label, the runs that a line
        is the mean of. They share a method, whose colour the line has.
      path: Where to write it.

    Returns:
      The path.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
        axes = figure.subplots(2, len(columns), sharex="col", squeeze=False)
        for column, (title, lines) in enumerate(columns.items()):
            opacities = _opacities(lines)
            for row, quantity in enumerate(("training_loss", "test_loss")):
                for label, records in lines.items():
                    _draw_band(
                        axes[row, column], label, records, quantity, opacities[label]
                    )
                _use_plain_log_scale(axes[row, column])
            axes[0, column].set_title(title)
            axes[0, column].margins(x=0.01)
            axes[1, column].set_xlabel("step")
        axes[0, 0].set_ylabel("training loss")
        axes[1, 0].set_ylabel("test loss")
        figure.align_ylabels()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=min(len(labels), _LEGEND_COLUMNS),
        )
        return save(figure, path)
