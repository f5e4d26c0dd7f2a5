"""Where the sign is the better direction: noise, conditioning, rotation."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from experiments.figures.style import WIDTH, color, save, style
from experiments.studies.study import StudyRecord

_COLORS = LinearSegmentedColormap.from_list(
    "gradient_to_sign", [color("sgd"), "#ffffff", color("adam")]
)
_POINTS = {
    "random": "at random points",
    "even": "where the loss is spread evenly over the eigendirections",
}
_DOMINANCES = [0.1, 0.2, 0.4]
_RATIOS = {1 / 3: "1/3", 1 / 2: "1/2", 1: "1", 2: "2", 3: "3"}


def _draw_map(
    axes: Axes,
    record: StudyRecord,
    points: str,
    noise: float,
    scale: Normalize,
    name_contours: bool,
) -> None:
    """Who wins, by how much, with the contours of diagonal dominance."""
    results = record.select(points=points, noise=noise)
    fractions = np.array([result["fraction"] for result in results])
    conditions = np.array(results[0]["conditions"])
    ratios = np.array([result["log10_ratio"] for result in results])
    dominances = np.array([result["diagonal_dominance"] for result in results])
    axes.pcolormesh(
        conditions, fractions, ratios, cmap=_COLORS, norm=scale, shading="gouraud"
    )
    if ratios.min() < 0 < ratios.max():
        axes.contour(conditions, fractions, ratios, levels=[0.0], colors="black")
    axes.contour(
        conditions,
        fractions,
        dominances,
        levels=_DOMINANCES,
        colors="#444444",
        linewidths=0.8,
        linestyles="dashed",
    )
    if name_contours:
        column = int(0.75 * len(conditions))
        for level in _DOMINANCES:
            height = np.interp(-level, -dominances[:, column], fractions)
            axes.text(
                conditions[column],
                height,
                f"c = {level:g}",
                fontsize=7,
                ha="center",
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
    axes.set_xscale("log")
    axes.set_xticks([1e0, 1e2, 1e4])
    axes.minorticks_off()
    axes.grid(visible=False)


def draw(record: StudyRecord, path: Path) -> Path:
    """Draws the map.

    Args:
      record: The record of a `MapStudy`.
      path: Where to write it.

    Returns:
      The path.
    """
    noises = record.config["noise_levels"]
    kinds = record.config["points"]
    largest = np.max(np.abs([result["log10_ratio"] for result in record.results]))
    scale = Normalize(-largest, largest)
    with style():
        figure = Figure(figsize=(1.25 * WIDTH, 4.6), layout="constrained")
        rows = figure.subfigures(len(kinds), 1, squeeze=False)[:, 0]
        panels = []
        for row, points in zip(rows, kinds, strict=True):
            axes = row.subplots(1, len(noises), sharey=True, squeeze=False)[0]
            row.suptitle(_POINTS[points], fontsize=11)
            for panel, noise in zip(axes, noises, strict=True):
                # The contours are the same in every row; the first has no black line.
                _draw_map(panel, record, points, noise, scale, points == kinds[0])
                panel.set_title(f"ν/σ = {noise:g}", fontsize=9)
            axes[0].set_ylabel("part of the rotation")
            axes[0].set_yticks([0.0, 0.5, 1.0])
            if points == kinds[-1]:
                row.supxlabel("condition number", fontsize=10)
            panels.append(axes)
        for row, axes in zip(rows, panels, strict=True):
            bar = row.colorbar(ScalarMappable(scale, _COLORS), ax=list(axes))
            ticks = {
                ratio: label
                for ratio, label in _RATIOS.items()
                if abs(np.log10(ratio)) <= largest
            }
            bar.set_ticks(np.log10(list(ticks)), labels=list(ticks.values()))
            bar.set_label("I(sign) / I(gradient)", fontsize=9)
        return save(figure, path)
