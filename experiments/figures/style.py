"""How all figures look: one colour per method, everywhere the same."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Okabe & Ito's palette, which people with any common colour vision can tell apart.
# Cold colours keep the magnitude, warm ones only the sign; lines of methods that are
# not adapted to the variance are dashed, those of variants dotted. So Table 1 can be
# read off a figure.
_COLORS = {
    "m_sgd": "#0072B2",
    "m_svag": "#009E73",
    "m_ssd": "#E69F00",
    "adam": "#D55E00",
    "adam_star": "#CC79A7",
    "m_svag_mb": "#56B4E9",
    "adam_star_mb": "#000000",
    "sgd": "#0072B2",
    "ssd": "#E69F00",
    "svag": "#009E73",
}
# For all others, Optax's for example, in the order in which a figure names them.
_OTHER_COLORS = ("#777777", "#882255", "#999933", "#332288", "#661100", "#44AA99")

# Inches; a README shows about 900 pixels, a column of text is as wide.
WIDTH = 7.2
_RESOLUTION = 160

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


# Variants of one method, in one figure, differ in the line too.
_LINES = {
    **dict.fromkeys(("m_sgd", "m_ssd", "sgd", "ssd"), "--"),
    "adam_star": "-.",
    "adam_star_mb": ":",
    "m_svag_mb": ":",
}
# They have the colours of those with momentum.
_WITHOUT_MOMENTUM = ("sgd", "ssd", "svag")


def line_style(method: str) -> str:
    """Line style of a method, by its name on the command line."""
    return _LINES.get(method, "-")


def line_width(method: str) -> float:
    """Line width of a method beside others, by its name on the command line."""
    return 0.8 if method in _WITHOUT_MOMENTUM else 1.6


def color(method: str) -> str:
    """Colour of a method of this library, by its name on the command line."""
    return _COLORS[method]


def colors(methods: Iterable[str]) -> dict[str, str]:
    """Colours of all methods in a figure, by their names on the command line."""
    others = itertools.cycle(_OTHER_COLORS)
    return {
        name: _COLORS[name] if name in _COLORS else next(others)
        for name in dict.fromkeys(methods)
    }


@contextmanager
def style() -> Iterator[None]:
    """Figures that are drawn inside look like one family."""
    with mpl.rc_context(_STYLE):
        yield


def save(figure: Figure, path: Path) -> Path:
    """Writes the figure as PNG.

    Args:
      figure: A figure made without pyplot, so that nothing needs to be closed.
      path: Where to; missing directories are made.

    Returns:
      The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_RESOLUTION)
    return path
