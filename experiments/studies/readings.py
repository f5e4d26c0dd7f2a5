"""What the records of the studies say, in numbers and beside what the paper says."""

from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from experiments.studies.study import StudyRecord

# Fits a terminal of 80 columns.
_LOOK: dict[str, Any] = {"box": box.SIMPLE, "pad_edge": False, "padding": (0, 1, 0, 0)}

# ---- Figure 2 ---------------------------------------------------------------------

# What §2.2 says of a panel, by spectrum, orientation and whether there is noise.
_PAPER = {
    ("well-conditioned", "rotated", False): "SGD, vastly",
    ("well-conditioned", "axis-aligned", False): "SGD, vastly",
    ("well-conditioned", "rotated", True): "almost even",
    ("well-conditioned", "axis-aligned", True): "almost even",
    ("ill-conditioned", "rotated", False): "roughly even",
    ("ill-conditioned", "rotated", True): "roughly even",
    ("ill-conditioned", "axis-aligned", False): "SSD, clearly",
    ("ill-conditioned", "axis-aligned", True): "SSD, clearly",
}
# Two losses below it are equal: the run is over.
_SOLVED = 1e-30


def read_quadratics(record: StudyRecord) -> list[dict[str, Any]]:
    """Who ends lower in each panel, by how much, and in how many seeds.

    Args:
      record: The record of a `QuadraticStudy`.

    Returns:
      For each panel its place, the median losses of both methods after the last step,
      the median over seeds of their ratio, and the numbers of seeds where each is
      lower.
    """
    panels = []
    for sgd in record.select(method="sgd"):
        place = {key: sgd[key] for key in ("spectrum", "orientation", "noise")}
        (ssd,) = record.select(method="ssd", **place)
        last_sgd, last_ssd = (
            np.maximum(np.array(result["losses"])[:, -1], _SOLVED)
            for result in (sgd, ssd)
        )
        panels.append(
            {
                **place,
                "diagonal_dominance": float(np.mean(sgd["diagonal_dominance"])),
                "sgd_loss": float(np.median(last_sgd)),
                "ssd_loss": float(np.median(last_ssd)),
                "sgd_over_ssd": float(np.median(last_sgd / last_ssd)),
                "sgd_wins": int(np.sum(last_sgd < last_ssd)),
                "ssd_wins": int(np.sum(last_ssd < last_sgd)),
                "seeds": len(last_sgd),
                "paper": _PAPER[sgd["spectrum"], sgd["orientation"], sgd["noise"] > 0],
            }
        )
    return panels


def quadratics_table(panels: list[dict[str, Any]]) -> Table:
    """The reading of Figure 2 as a table.

    Args:
      panels: What `read_quadratics` returns.

    Returns:
      A table for Rich.
    """
    table = Table(title="Figure 2: who has the lower loss after the last step", **_LOOK)
    for name in ("spectrum", "basis", "c", "ν", "lower", "by", "in seeds", "§2.2"):
        numeric = name in ("c", "ν", "by", "in seeds")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for panel in panels:
        ratio, seeds = panel["sgd_over_ssd"], panel["seeds"]
        leader = "SSD" if ratio > 1 else "SGD"
        wins = panel[f"{leader.lower()}_wins"]
        ratio = max(ratio, 1 / ratio)
        table.add_row(
            panel["spectrum"].removesuffix("-conditioned"),
            panel["orientation"],
            f"{panel['diagonal_dominance']:.2f}",
            f"{panel['noise']:g}",
            leader if wins > 0.8 * seeds else f"even, {leader}",
            f"{ratio:.1f}×" if ratio < 1000 else f"10^{np.log10(ratio):.0f}×",
            f"{wins} of {seeds}",
            panel["paper"],
        )
    return table


# ---- The start --------------------------------------------------------------------


def read_starts(record: StudyRecord) -> list[dict[str, Any]]:
    """How the comparison of Figure 2 turns with the start.

    Args:
      record: The record of a `StartStudy`.

    Returns:
      For each problem and each ratio σ/ν: the median over seeds of both losses after
      the last step, relative to the first, and of their ratio, with its quartiles.
    """
    readings = []
    for result in record.results:
        sgd, ssd = (np.array(result["relative_loss"][name]) for name in ("sgd", "ssd"))
        low, median, high = np.quantile(sgd / ssd, [0.25, 0.5, 0.75])
        readings.append(
            {
                "spectrum": result["spectrum"],
                "orientation": result["orientation"],
                "start_over_noise": result["start_over_noise"],
                "sgd_loss": float(np.median(sgd)),
                "ssd_loss": float(np.median(ssd)),
                "sgd_over_ssd": float(median),
                "sgd_over_ssd_quartiles": [float(low), float(high)],
            }
        )
    return readings


def starts_table(readings: list[dict[str, Any]]) -> Table:
    """The reading of the study of starts as a table.

    Args:
      readings: What `read_starts` returns.

    Returns:
      A table for Rich: a row per ratio, a column per problem.
    """
    table = Table(title="Loss of SGD over that of SSD after the last step", **_LOOK)
    table.add_column("σ/ν", justify="right")
    problems = dict.fromkeys((r["spectrum"], r["orientation"]) for r in readings)
    for spectrum, orientation in problems:
        name = f"{spectrum.removesuffix('-conditioned')}, {orientation}"
        table.add_column(name, justify="right")
    for ratio in dict.fromkeys(r["start_over_noise"] for r in readings):
        row = [r["sgd_over_ssd"] for r in readings if r["start_over_noise"] == ratio]
        table.add_row(f"{ratio:g}", *(f"{value:.3g}" for value in row))
    return table


# ---- Eigenbases -------------------------------------------------------------------


def read_eigenbases(record: StudyRecord) -> list[dict[str, Any]]:
    """1-norms of eigenvectors and the mass off the diagonal, a row per spectrum.

    Args:
      record: The record of an `EigenbasisStudy`.

    Returns:
      The results with 1-norms over √d, by dimension, fraction and spectrum.
    """
    return [
        {
            "spectrum": spectrum,
            "dimensions": result["dimensions"],
            "fraction": result["fraction"],
            "mean_norm_over_root": result[spectrum]["mean_norm"]
            / result["dimensions"] ** 0.5,
            **result[spectrum],
        }
        for result in record.results
        for spectrum in result
        if spectrum not in ("dimensions", "fraction")
    ]


def eigenbases_table(readings: list[dict[str, Any]]) -> Table:
    """The reading of the study of eigenbases as a table.

    Args:
      readings: What `read_eigenbases` returns.

    Returns:
      A table for Rich.
    """
    table = Table(
        title="§2.1: 1-norms of eigenvectors, and the mass of Q off its diagonal",
        **_LOOK,
    )
    table.add_column("spectrum")
    for name in ("d", "rotation", "‖v‖₁/√d", "Σ|q|/Σλ", "Σλ‖v‖₁²/Σλ", "c"):
        table.add_column(name, justify="right")
    for reading in readings:
        table.add_row(
            reading["spectrum"].removesuffix("-conditioned"),
            str(reading["dimensions"]),
            f"{reading['fraction']:g}",
            f"{reading['mean_norm_over_root']:.2f}",
            f"{reading['mass_over_trace']:.1f}",
            f"{reading['bound_over_trace']:.1f}",
            f"{reading['diagonal_dominance']:.3f}",
        )
    return table


# ---- The map ----------------------------------------------------------------------


def read_map(record: StudyRecord) -> list[dict[str, Any]]:
    """How much of each panel of the map the sign wins, and from where on.

    Args:
      record: The record of a `MapStudy`.

    Returns:
      For each kind of points and noise level: the share of the panel where the sign is
      better, its largest advantage, the smallest condition number where it wins with
      the axis-aligned basis, and the largest part of the rotation at which it still
      wins with the largest condition number, with the dominance c there.
    """
    readings = []
    for points in record.config["points"]:
        for noise in record.config["noise_levels"]:
            results = record.select(points=points, noise=noise)
            ratios = np.array([result["log10_ratio"] for result in results])
            conditions = np.array(results[0]["conditions"])
            aligned = conditions[ratios[0] > 0]
            last = [result for result in results if result["log10_ratio"][-1] > 0]
            readings.append(
                {
                    "points": points,
                    "noise": noise,
                    "share_won_by_sign": float(np.mean(ratios > 0)),
                    "largest_ratio": float(10 ** np.max(ratios)),
                    "smallest_ratio": float(10 ** np.min(ratios)),
                    "aligned_from_condition": (
                        float(aligned[0]) if aligned.size else None
                    ),
                    "up_to_fraction": last[-1]["fraction"] if last else None,
                    "dominance_there": (
                        last[-1]["diagonal_dominance"][-1] if last else None
                    ),
                }
            )
    return readings


def map_table(readings: list[dict[str, Any]]) -> Table:
    """The reading of the map as a table.

    Args:
      readings: What `read_map` returns.

    Returns:
      A table for Rich.
    """
    table = Table(
        title="Where the sign s is expected to improve more than the gradient g",
        caption="κ: least condition number where s wins, axis-aligned.\n"
        "Rotation: largest part where s wins, worst conditioned.",
        **_LOOK,
    )
    table.add_column("points")
    for name in ("ν", "of the map", "best I(s)/I(g)", "κ", "rotation", "c there"):
        table.add_column(name, justify="right", no_wrap=True)
    for reading in readings:
        table.add_row(
            reading["points"],
            f"{reading['noise']:g}",
            f"{reading['share_won_by_sign']:.0%}",
            f"{reading['largest_ratio']:.2f}",
            _number(reading["aligned_from_condition"], ".0f"),
            _number(reading["up_to_fraction"], ".2f"),
            _number(reading["dominance_there"], ".2f"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    """The value, or a dash for none."""
    return "–" if value is None else format(value, form)


# ---- Theorem 1 --------------------------------------------------------------------


def read_convergence(record: StudyRecord) -> list[dict[str, Any]]:
    """The fitted slopes, and how the errors lie to the bound.

    Args:
      record: The record of a `ConvergenceStudy`.

    Returns:
      For each condition number and method: the last error, the slope of its logarithm
      over that of the step in the last factor of ten and, for SVAG, the smallest ratio
      of the bound to the error over all recorded steps but the start.
    """
    return [
        {
            "condition": result["condition"],
            "method": result["method"],
            "steps": result["steps"][-1],
            "last_error": result["error"][-1],
            "slope": result["slope"],
            "second_moment": result["second_moment"],
            "smallest_bound_over_error": (
                float(np.min(np.divide(result["bound"], result["error"])[1:]))
                if result["method"] == "svag"
                else None
            ),
        }
        for result in record.results
    ]


def convergence_table(readings: list[dict[str, Any]]) -> Table:
    """The reading of the Theorem 1 study as a table.

    Args:
      readings: What `read_convergence` returns.

    Returns:
      A table for Rich.
    """
    table = Table(title="Theorem 1: a constant step size of 1/L", **_LOOK)
    table.add_column("method")
    for name in ("condition", "last error", "last slope", "least bound/error"):
        table.add_column(name, justify="right")
    for reading in readings:
        table.add_row(
            reading["method"].upper(),
            f"{reading['condition']:g}",
            f"{reading['last_error']:.2g}",
            f"{reading['slope']:+.2f}",
            _number(reading["smallest_bound_over_error"], ".2f"),
        )
    return table
