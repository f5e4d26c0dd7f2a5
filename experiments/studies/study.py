"""Runs a study once, with a bar, and keeps its record beside those of the runs.

A record is one file, runs/studies/quadratic_1f0c2a9b.json: the study's settings, what
it ran on, and its results, one per line.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import track

from dissect_optax.dissection import (
    UserError,
    digest,
    environment,
    read_checked,
    write_checked,
)


class Study(Protocol):
    """The settings of a study, a dataclass that knows how to run itself."""

    @property
    def name(self) -> str:
        """The study's name on the command line."""

    @property
    def count(self) -> int:
        """How many results it has."""

    def run(self) -> Iterator[dict[str, Any]]:
        """The results, in the order in which they are finished."""


@dataclasses.dataclass(frozen=True)
class StudyRecord:
    """A finished study of the theory.

    Attributes:
      path: Its file.
      config: The settings.
      environment: What it ran on.
      results: Its results, one JSON object each.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    results: list[dict[str, Any]]

    def select(self, **wanted: Any) -> list[dict[str, Any]]:
        """The results whose entries have these values, in their order."""
        return [
            result
            for result in self.results
            if all(result[key] == value for key, value in wanted.items())
        ]


def complete(study: Study, runs_dir: Path) -> StudyRecord:
    """The record of a study, which runs unless there is one.

    Args:
      study: The settings.
      runs_dir: The directory of all records.

    Returns:
      The record.

    Raises:
      UserError: There is a record, and it is damaged.
    """
    config = dataclasses.asdict(study)  # type: ignore[call-overload]
    path = runs_dir / "studies" / f"{study.name}_{digest(config)}.json"
    if not path.exists():
        results = track(
            study.run(),
            description=study.name,
            total=study.count,
            console=Console(stderr=True),
            transient=True,
        )
        content = {
            "config": config,
            "environment": environment(),
            "results": list(results),
        }
        write_checked(path, content)
    try:
        return StudyRecord(path, **read_checked(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"The record {path} cannot be read ({error}). Remove it to run the study"
            " again."
        ) from error
