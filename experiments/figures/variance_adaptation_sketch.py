"""Figure 1: what variance adaptation does to stochastic gradients in two dimensions."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from experiments.figures.style import WIDTH, color, save, style


def _draw_cloud(
    axes: Axes,
    gradient: np.ndarray,
    std: np.ndarray,
    samples: np.ndarray,
    factors: np.ndarray,
) -> None:
    """Adapted samples, their one-deviation ellipse, their mean and the gradient."""
    shade = color("sgd") if np.all(factors == 1) else color("svag")
    mean, adapted = factors * gradient, factors * samples
    axes.scatter(
        adapted[:, 0], adapted[:, 1], s=7, color=shade, alpha=0.35, linewidths=0
    )
    axes.add_patch(
        Ellipse(
            tuple(mean),
            *(2 * factors * std),
            fill=False,
            edgecolor=shade,
            linewidth=1.4,
        )
    )
    for vector, line_color, label in (
        (gradient, "#222222", "true gradient ∇L"),
        (mean, shade, "expected direction"),
    ):
        if label.startswith("true") or not np.all(factors == 1):
            axes.annotate(
                "",
                xy=tuple(vector),
                xytext=(0, 0),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": line_color,
                    "linewidth": 2,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
            axes.plot([], [], color=line_color, linewidth=2, label=label)
    axes.set_aspect("equal")
    axes.set_xlim(-1.6, 5.2)
    axes.set_ylim(-3.6, 5.4)
    axes.axhline(0, color="#aaaaaa", linewidth=0.8)
    axes.axvline(0, color="#aaaaaa", linewidth=0.8)
    axes.set_xlabel("first coordinate")
    axes.legend(loc="lower right", fontsize=9)


def draw(
    gradient: np.ndarray,
    std: np.ndarray,
    samples: np.ndarray,
    factors: np.ndarray,
    path: Path,
) -> Path:
    """Draws the figure.

    Args:
      gradient: The true gradient, of shape [2].
      std: Standard deviations of the stochastic gradient, of shape [2].
      samples: Stochastic gradients, of shape [samples, 2].
      factors: The variance adaptation factors, of shape [2].
      path: Where to write it.

    Returns:
      The path.
    """
    first, second = factors
    with style():
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        plain, adapted = figure.subplots(1, 2, sharey=True)
        _draw_cloud(plain, gradient, std, samples, np.ones(2))
        _draw_cloud(adapted, gradient, std, samples, factors)
        plain.set_title("stochastic gradients g")
        adapted.set_title(f"γ ⊙ g,  γ = ({first:.2f}, {second:.2f})")
        plain.set_ylabel("second coordinate")
        return save(figure, path)
