"""Figures 3, 6 and 7: losses and test accuracy over steps, one column per problem."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from dissect_optax.dissection import Record
from experiments.figures.style import (
    WIDTH,
    colors,
    line_style,
    line_width,
    save,
    style,
)

_LEGEND_COLUMNS = 4
_ROWS = {
    "training_loss": "training loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
}
# From here on lines lie close together; the axis of the accuracy shows them apart.
_SETTLED = 0.2


def _curves(records: Sequence[Record], quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the quantity per run and step; NaN after a run diverged."""
    longest = max(records, key=lambda record: len(record.evaluations))
    steps = np.array([line.step for line in longest.evaluations])
    values = np.full((len(records), len(steps)), np.nan)
    for row, record in zip(values, records, strict=True):
        row[: len(record.evaluations)] = [line[quantity] for line in record.evaluations]
    return steps, values


def _opacities(method_of: Mapping[str, str]) -> dict[str, float]:
    """How strongly a line is drawn: among those of one method, each more than the last.

    Methods have a colour each; this tells their step sizes apart.
    """
    totals = Counter(method_of.values())
    counts: Counter[str] = Counter()
    opacities = {}
    for label, method in method_of.items():
        counts[method] += 1
        opacities[label] = 1 - 0.8 * (1 - counts[method] / totals[method])
    return opacities


def _draw_band(
    axes: Axes,
    label: str,
    records: Sequence[Record],
    quantity: str,
    shade: str,
    opacity: float,
) -> None:
    """Mean of the runs that did not diverge, shaded by one standard deviation."""
    finished = [record for record in records if not record.diverged]
    steps, values = _curves(finished or records, quantity)
    mean = values.mean(axis=0)
    method = records[0].config.optimizer
    axes.plot(
        steps,
        mean,
        color=shade,
        alpha=opacity,
        linestyle=line_style(method),
        linewidth=line_width(method),
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


def _cut_off_diverged_losses(
    axes: Axes, lines: Mapping[str, Sequence[Record]], quantity: str
) -> None:
    """Ends the axis at twice the loss of untrained networks, for the other lines."""
    untrained = max(
        record.evaluations[0][quantity]
        for records in lines.values()
        for record in records
    )
    if axes.get_ylim()[1] > 2 * untrained:
        lowest = min(np.nanmin(np.asarray(line.get_ydata())) for line in axes.lines)
        axes.set_ylim(0.8 * lowest, 2 * untrained)


def _show_settled_accuracies(axes: Axes, lines: Mapping[str, Sequence[Record]]) -> None:
    """Limits the axis to what is reached after a fifth of the steps."""
    settled = [
        line["test_accuracy"]
        for records in lines.values()
        for record in records
        if not record.diverged
        for line in record.evaluations
        if line.step >= _SETTLED * record.evaluations[-1].step
    ]
    low, high = min(settled, default=0.0), max(settled, default=1.0)
    margin = max(0.05 * (high - low), 0.002)
    axes.set_ylim(max(low - margin, 0.0), min(high + margin, 1.0))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _use_plain_ticks(axes: Axes) -> None:
    """Ticks of a logarithmic axis that read 0.2, 0.5, 1, 2."""
    low, high = axes.get_ylim()
    # Over many decades the locator has ticks at powers of ten or none.
    subs = (1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _note_diverged(axes: Axes, lines: Mapping[str, Sequence[Record]]) -> None:
    """Says which runs are in no mean."""
    notes = []
    for label, records in lines.items():
        if diverged := sum(record.diverged for record in records):
            notes.append(f"{label}: {diverged} of {len(records)} diverged")
    if notes:
        axes.text(
            *(0.98, 0.98, "\n".join(notes)),
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize="x-small",
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none"},
        )


def draw(columns: Mapping[str, Mapping[str, Sequence[Record]]], path: Path) -> Path:
    """Draws the figure.

    Args:
      columns: By the problem's title, and by the line's label, the runs that a line
        is the mean of. They share a method, whose colour the line has.
      path: Where to write it.

    Returns:
      The path.
    """
    method_of = {
        label: records[0].config.optimizer
        for lines in columns.values()
        for label, records in lines.items()
    }
    shades = colors(method_of.values())
    opacities = _opacities(method_of)
    legend_columns = min(len(method_of), _LEGEND_COLUMNS)
    legend_rows = math.ceil(len(method_of) / legend_columns)
    with style():
        size = (WIDTH, 6.8 + 0.2 * (legend_rows - 1))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(_ROWS), len(columns), sharex="col", squeeze=False)
        handles: dict[str, Artist] = {}
        for column, (title, lines) in enumerate(columns.items()):
            for row, quantity in enumerate(_ROWS):
                for label, records in lines.items():
                    shade = shades[method_of[label]]
                    _draw_band(
                        axes[row, column],
                        label,
                        records,
                        quantity,
                        shade,
                        opacities[label],
                    )
                if quantity == "test_accuracy":
                    _show_settled_accuracies(axes[row, column], lines)
                    continue
                axes[row, column].set_yscale("log")
                _cut_off_diverged_losses(axes[row, column], lines, quantity)
                _use_plain_ticks(axes[row, column])
            axes[0, column].set_title(title)
            axes[0, column].margins(x=0.0)
            axes[-1, column].set_xlabel("step")
            axes[-1, column].xaxis.set_major_locator(
                MaxNLocator(integer=True, steps=[1, 2, 5, 10])
            )
            _note_diverged(axes[0, column], lines)
            found, labels = axes[0, column].get_legend_handles_labels()
            handles |= dict(zip(labels, found, strict=True))
        for row, label in enumerate(_ROWS.values()):
            axes[row, 0].set_ylabel(label)
        figure.align_ylabels()
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper center",
            ncols=legend_columns,
        )
        return save(figure, path)
