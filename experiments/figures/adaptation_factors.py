"""Figure 5: the variance adaptation factors over the relative standard deviation."""

from pathlib import Path

import jax.numpy as jnp
from matplotlib.figure import Figure

from dissect_optax import gaussian_sign, inverse, inverse_sqrt
from experiments.figures.style import WIDTH, color, save, style


def draw(path: Path) -> Path:
    """Draws the figure.

    Args:
      path: Where to write it.

    Returns:
      The path.
    """
    eta = jnp.linspace(0.0, 5.0, 501)
    curves = [
        (
            inverse,
            "(1 + η²)$^{-1}$, optimal for the gradient: SVAG",
            color("svag"),
            "solid",
        ),
        (inverse_sqrt, "(1 + η²)$^{-1/2}$, ADAM's", color("adam"), "solid"),
        (gaussian_sign, "erf(1/(√2 η)), optimal for the sign", "#222222", "dotted"),
    ]
    with style():
        figure = Figure(figsize=(0.72 * WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        for factor, label, shade, line in curves:
            axes.plot(
                eta,
                factor(jnp.square(eta)),
                color=shade,
                linestyle=line,
                label=label,
            )
        axes.set_xlabel("relative standard deviation η")
        axes.set_ylabel("factor γ")
        axes.set_xlim(0, 5)
        axes.set_ylim(0, 1.03)
        axes.legend(loc="upper right")
        return save(figure, path)
