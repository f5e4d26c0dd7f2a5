"""Figure 4: the probability of a wrong sign grows with the relative variance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.figures.style import WIDTH, color, save, style


def draw(panels: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draws the figure.

    Args:
      panels: Distributions of a gradient by their `mean` and `variance`, each with its
        `density` at the points `x`, and the probability of a `wrong_sign`.
      path: Where to write it.

    Returns:
      The path.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, sharex=True)
        for panel, content in zip(axes, panels, strict=True):
            x, density = np.asarray(content["x"]), np.asarray(content["density"])
            wrong = x <= 0
            panel.plot(x, density, color="#444444")
            panel.fill_between(
                x[wrong], density[wrong], color=color("adam"), alpha=0.6, linewidth=0
            )
            panel.set_title(f"σ² = {content['variance']:g}")
            panel.text(
                0.98,
                0.95,
                f"wrong sign:\n{content['wrong_sign']:.1%}",
                transform=panel.transAxes,
                horizontalalignment="right",
                verticalalignment="top",
                color=color("adam"),
            )
            panel.axvline(0, color="#aaaaaa", linewidth=0.8)
            panel.set_xlabel(f"gradient, mean {content['mean']:g}")
        axes[0].set_ylabel("density")
        axes[0].set_ylim(bottom=0)
        return save(figure, path)
