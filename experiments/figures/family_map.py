"""The map of the family: what each cell changes against ADAM."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter

from experiments.figures.style import WIDTH, save, style

# One colour per order, one shape per kind of direction, filled where published.
_COLORS = {
    "no momentum": "#009E73",
    "before momentum": "#E69F00",
    "after momentum": "#0072B2",
}
_AXIS_COLORS = {
    "direction": "#0072B2",
    "source": "#009E73",
    "factor": "#D55E00",
    "order": "#E69F00",
}
_ROW_HEIGHT = 0.27
# Of differences larger than this the axis is logarithmic, away from zero.
_WIDE_RANGE = 1.0


def _label(row: Mapping[str, Any]) -> str:
    """Name and cell of a member."""
    source = f" × {row['source']}" if row["source"] else ""
    factor = f" × {row['factor']}" if row["factor"] != "1" else ""
    return f"{row['member']}:  {row['direction']}{source}{factor}"


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path:
    """Draws the figure.

    Args:
      rows: The map, see `experiments.studies.family_map.rows_of`.
      title: Title of the problem.
      path: Where to write it.

    Returns:
      The path.
    """
    shown = [row for row in rows if "difference" in row]
    # By order, then from best to worst.
    shown.sort(
        key=lambda row: (
            list(_COLORS).index(row["order"]),
            -row["difference"]["estimate"],
        )
    )
    with style():
        height = 1.6 + _ROW_HEIGHT * len(shown)
        figure = Figure(figsize=(1.35 * WIDTH, height), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(shown):
            color, found = _COLORS[row["order"]], row["difference"]
            axes.plot([found["low"], found["high"]], [place, place], color=color)
            axes.plot(
                found["estimate"],
                place,
                "o" if "sign" in row["direction"] else "s",
                color=color,
                markerfacecolor=color if row["published"] else "white",
            )
        axes.axvline(0.0, color="#666666", linewidth=0.8)
        axes.set_yticks(range(len(shown)), [_label(row) for row in shown], fontsize=7)
        largest = max(
            (abs(row["difference"]["estimate"]) for row in shown), default=0.0
        )
        if largest > _WIDE_RANGE:
            axes.set_xscale("symlog", linthresh=0.3)
        axes.set_xlabel("difference to ADAM in the mean log training loss")
        axes.set_title(title)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%+g"))
        axes.set_ylim(-0.7, len(shown) - 0.3)
        handles = [
            Line2D([], [], color=color, marker="o", label=f"factor {order}")
            if order != "no momentum"
            else Line2D([], [], color=color, marker="o", label=order)
            for order, color in _COLORS.items()
        ]
        for marker, filled, label in (
            ("o", True, "along a sign"),
            ("s", True, "with its magnitude"),
            ("o", False, "not published"),
        ):
            handles.append(
                Line2D(
                    [],
                    [],
                    color="#666666",
                    linestyle="",
                    marker=marker,
                    markerfacecolor="#666666" if filled else "white",
                    label=label,
                )
            )
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return save(figure, path)


def draw_changes(changes: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path:
    """Draws what one part exchanged changes, axis by axis.

    Args:
      changes: See `experiments.studies.family_map.changes_of`.
      title: Title of the problem.
      path: Where to write it.

    Returns:
      The path.
    """
    # From the top: the axes in their order, each from best to worst.
    shown = sorted(
        changes,
        key=lambda row: (
            -list(_AXIS_COLORS).index(row["axis"]),
            -row["difference"]["estimate"],
        ),
    )
    with style():
        height = 1.5 + _ROW_HEIGHT * len(shown)
        figure = Figure(figsize=(1.35 * WIDTH, height), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(shown):
            color, found = _AXIS_COLORS[row["axis"]], row["difference"]
            axes.plot([found["low"], found["high"]], [place, place], color=color)
            face = color if found["decided"] else "white"
            axes.plot(found["estimate"], place, "o", color=color, markerfacecolor=face)
        axes.axvline(0.0, color="#666666", linewidth=0.8)
        labels = [
            f"{row['change']}   ({row['before']} → {row['after']})" for row in shown
        ]
        axes.set_yticks(range(len(shown)), labels, fontsize=7)
        axes.set_xlabel("change of the mean log training loss")
        axes.set_title(title)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%+g"))
        axes.set_ylim(-0.7, len(shown) - 0.3)
        handles = [
            Line2D([], [], color=color, marker="o", label=axis)
            for axis, color in _AXIS_COLORS.items()
        ]
        undecided = Line2D(
            [],
            [],
            color="#666666",
            linestyle="",
            marker="o",
            markerfacecolor="white",
            label="not decided",
        )
        figure.legend(
            handles=[*handles, undecided], loc="outside lower center", ncols=5
        )
        return save(figure, path)
