"""Figure 5: the variance adaptation factors over the relative standard deviation."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.figures.style import WIDTH, color, save, style

_LOOKS = {
    "inverse": (
        "(1 + η²)$^{-1}$, optimal for the gradient: SVAG",
        color("svag"),
        "solid",
    ),
    "inverse_sqrt": ("(1 + η²)$^{-1/2}$, ADAM's", color("adam"), "solid"),
    "gaussian_sign": ("erf(1/(√2 η)), optimal for the sign", "#222222", "dotted"),
}


def draw(eta: np.ndarray, factors: Mapping[str, np.ndarray], path: Path) -> Path:
    """Draws the figure.

    Args:
      eta: Relative standard deviations η.
      factors: By the factor's name in `dissect_optax`, its values at η.
      path: Where to write it.

    Returns:
      The path.
    """
    with style():
        figure = Figure(figsize=(0.72 * WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, factor in factors.items():
            label, shade, line = _LOOKS[name]
            axes.plot(eta, factor, color=shade, linestyle=line, label=label)
        axes.set_xlabel("relative standard deviation η")
        axes.set_ylabel("factor γ")
        axes.set_xlim(0, 5)
        axes.set_ylim(0, 1.03)
        axes.legend(loc="upper right")
        return save(figure, path)
