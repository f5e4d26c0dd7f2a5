"""§2.1 on eigenvectors: their 1-norms, and the diagonal dominance they leave."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import WIDTH, save, style
from experiments.studies.readings import read_eigenbases
from experiments.studies.study import StudyRecord

_COLORS = ("#009E73", "#E69F00", "#0072B2")
_LINES = {"well-conditioned": "-", "ill-conditioned": "--"}
_NAMES = {0.0: "on the axes", 1.0: "drawn uniformly"}
# What Becker & LeCun (1988) found in Hessians of networks, as §2.1 quotes it.
_FOUND = (0.1, 0.6)


def _finish(axes: Axes, sizes: list[int], label: str) -> None:
    """Labels of a panel over the dimensions."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("dimensions d")
    axes.set_ylabel(label)


def draw(record: StudyRecord, path: Path) -> Path:
    """Draws the figure.

    Args:
      record: The record of an `EigenbasisStudy`.
      path: Where to write it.

    Returns:
      The path.
    """
    readings = read_eigenbases(record)
    sizes = list(dict.fromkeys(r["dimensions"] for r in readings))
    fractions = list(dict.fromkeys(r["fraction"] for r in readings))
    spectra = list(dict.fromkeys(r["spectrum"] for r in readings))
    with style():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        norms, dominances = figure.subplots(1, 2)
        for fraction, shade in zip(fractions, _COLORS, strict=False):
            name = _NAMES.get(fraction, f"{fraction:g} of the way to a rotation")
            for spectrum in spectra:
                shown = [
                    r
                    for r in readings
                    if (r["fraction"], r["spectrum"]) == (fraction, spectrum)
                ]
                if spectrum == spectra[0]:
                    mean = [r["mean_norm"] for r in shown]
                    norms.plot(sizes, mean, "o-", markersize=3, color=shade, label=name)
                dominances.plot(
                    sizes,
                    [r["diagonal_dominance"] for r in shown],
                    marker="o",
                    markersize=3,
                    color=shade,
                    linestyle=_LINES[spectrum],
                )
        norms.plot(sizes, np.sqrt(sizes), ":", color="#222222", label="bound √d")
        dominances.axhspan(*_FOUND, color="#888888", alpha=0.2, linewidth=0)
        dominances.text(sizes[-1], 0.49, "Becker & LeCun, 1988", fontsize=7, ha="right")
        for spectrum in spectra:
            style_of = _LINES[spectrum]
            dominances.plot([], [], style_of, color="#555555", label=spectrum)
        dominances.legend(fontsize=8, loc="lower left")
        _finish(norms, sizes, "mean 1-norm of the eigenvectors")
        _finish(dominances, sizes, "diagonal dominance c")
        figure.legend(
            *norms.get_legend_handles_labels(), loc="outside upper center", ncols=4
        )
        return save(figure, path)
