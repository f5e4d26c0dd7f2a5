"""How the comparison of SGD and SSD turns with the start."""

from pathlib import Path

from matplotlib.figure import Figure

from experiments.figures.style import WIDTH, save, style
from experiments.studies.readings import read_starts
from experiments.studies.study import StudyRecord

_COLORS = {"well-conditioned": "#0072B2", "ill-conditioned": "#D55E00"}
_LINES = {"rotated": "--", "axis-aligned": "-"}


def draw(record: StudyRecord, path: Path) -> Path:
    """Draws the figure.

    Args:
      record: The record of a `StartStudy`.
      path: Where to write it.

    Returns:
      The path.
    """
    readings = read_starts(record)
    problems = dict.fromkeys((r["spectrum"], r["orientation"]) for r in readings)
    with style():
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        for spectrum, orientation in problems:
            shown = [
                r
                for r in readings
                if (r["spectrum"], r["orientation"]) == (spectrum, orientation)
            ]
            ratios = [r["start_over_noise"] for r in shown]
            low, high = zip(*(r["sgd_over_ssd_quartiles"] for r in shown), strict=True)
            axes.plot(
                ratios,
                [r["sgd_over_ssd"] for r in shown],
                color=_COLORS[spectrum],
                linestyle=_LINES[orientation],
                marker="o",
                markersize=3,
                label=f"{spectrum}, {orientation}",
            )
            axes.fill_between(
                ratios, low, high, color=_COLORS[spectrum], alpha=0.15, linewidth=0
            )
        axes.axhline(1.0, color="#222222", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("scale of the start over that of the noise, σ/ν")
        axes.set_ylabel("loss of SGD / loss of SSD")
        figure.legend(loc="outside upper center", ncols=2)
        return save(figure, path)
