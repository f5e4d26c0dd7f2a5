"""The studies by name: how each is run, read and drawn."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dissect_optax.dissection import to_text, write_atomically
from experiments.figures import convergence as convergence_figure
from experiments.figures import eigenbases as eigenbases_figure
from experiments.figures import quadratics as quadratics_figure
from experiments.figures import sign_map as map_figure
from experiments.figures import starts as starts_figure
from experiments.studies import (
    convergence,
    eigenbases,
    quadratics,
    readings,
    sign_map,
    starts,
)
from experiments.studies.study import Study, StudyRecord, complete

Reading = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A study, what its record says, and its figure.

    Attributes:
      settings: The study.
      smoke: The same at a small size.
      read: From the record to the summary.
      table: From the summary to what is printed.
      draw: From the record to the figure.
    """

    settings: Study
    smoke: Study
    read: Callable[[StudyRecord], Reading]
    table: Callable[[Reading], Table]
    draw: Callable[[StudyRecord, Path], Path]


STUDIES = {
    "quadratic": Entry(
        quadratics.QuadraticStudy(),
        quadratics.SMOKE,
        readings.read_quadratics,
        readings.quadratics_table,
        quadratics_figure.draw,
    ),
    "starts": Entry(
        starts.StartStudy(),
        starts.SMOKE,
        readings.read_starts,
        readings.starts_table,
        starts_figure.draw,
    ),
    "eigenbases": Entry(
        eigenbases.EigenbasisStudy(),
        eigenbases.SMOKE,
        readings.read_eigenbases,
        readings.eigenbases_table,
        eigenbases_figure.draw,
    ),
    "map": Entry(
        sign_map.MapStudy(),
        sign_map.SMOKE,
        readings.read_map,
        readings.map_table,
        map_figure.draw,
    ),
    "convergence": Entry(
        convergence.ConvergenceStudy(),
        convergence.SMOKE,
        readings.read_convergence,
        readings.convergence_table,
        convergence_figure.draw,
    ),
}


def draw(name: str, runs_dir: Path, figure: Path, *, smoke: bool) -> Path:
    """Draws a study, which runs first unless there is a record of it.

    Args:
      name: The study.
      runs_dir: The directory of all records.
      figure: Where to write the figure.
      smoke: The small size.

    Returns:
      The path of the figure.
    """
    entry = STUDIES[name]
    record = complete(entry.smoke if smoke else entry.settings, runs_dir)
    return entry.draw(record, figure)


def report(name: str, runs_dir: Path, *, smoke: bool) -> Path:
    """Prints the reading of a study, which runs first unless there is a record of it.

    Args:
      name: The study.
      runs_dir: The directory of all records.
      smoke: The small size.

    Returns:
      The path of the summary: the reading, the settings and what it ran on.
    """
    entry = STUDIES[name]
    record = complete(entry.smoke if smoke else entry.settings, runs_dir)
    reading = entry.read(record)
    Console().print(entry.table(reading))
    suffix = "_smoke" if smoke else ""
    summary = {
        "settings": record.config,
        "environment": record.environment,
        "results": reading,
    }
    path = runs_dir / "studies" / f"{name}{suffix}_summary.json"
    write_atomically(path, to_text(summary))
    return path
