"""Figure 4: the probability of a wrong sign grows with the relative variance."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dissect_optax import theory
from experiments.figures.style import WIDTH, color, save, style

_MEAN = 1.0
_VARIANCES = (0.5, 1.0, 4.0)


def draw(path: Path) -> Path:
    """Draws the figure.

    Args:
      path: Where to write it.

    Returns:
      The path.
    """
    x = np.linspace(-4.5, 6.5, 1001)
    wrong = x <= 0
    with style():
        figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
        axes = figure.subplots(1, len(_VARIANCES), sharey=True, sharex=True)
        for panel, variance in zip(axes, _VARIANCES, strict=True):
            deviation = np.sqrt(variance)
            density = np.exp(-((x - _MEAN) ** 2) / (2 * variance))
            density /= deviation * np.sqrt(2 * np.pi)
            panel.plot(x, density, color="#444444")
            panel.fill_between(
                x[wrong], density[wrong], color=color("adam"), alpha=0.6, linewidth=0
            )
            rho = theory.success_probability(_MEAN, deviation)
            panel.set_title(f"σ² = {variance:g}")
            panel.text(
                0.98,
                0.95,
                f"wrong sign:\n{1 - float(rho):.1%}",
                transform=panel.transAxes,
                horizontalalignment="right",
                verticalalignment="top",
                color=color("adam"),
            )
            panel.axvline(0, color="#aaaaaa", linewidth=0.8)
            panel.set_xlabel("gradient, mean 1")
        axes[0].set_ylabel("density")
        axes[0].set_ylim(bottom=0)
        return save(figure, path)
